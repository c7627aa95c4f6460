"""The tokenizer as the node sees it: a child process that may die, behind calls that answer or say why not.

Invariant: one request at a time; a request that ends the process or takes too long fails alone, and the next one
finds a new process.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec
import trio

from meshnode.core.serving.text import Conversation, Vocabulary
from meshnode.errors import InvalidRequest, ModelError, StageError, StageLost
from meshnode.io.stage.spawn import ChildProcess
from meshnode.io.stage.tokenizer_protocol import (
    LENGTH_BYTES,
    MESSAGE_BYTES,
    Check,
    Checked,
    Described,
    Open,
    Refused,
    Render,
    Rendered,
    Reply,
    Request,
    Shutdown,
    Tokenize,
    Tokens,
    decode_reply,
    encode,
    fits,
)

OPEN_S: Final = 60.0
"""A vocabulary of 150k tokens loads in 0.5 s; a cold disk and a busy machine are far below this."""
TOKENIZE_S: Final = 30.0
"""4 MiB of text took 3 to 9 s."""
RENDER_S: Final = 5.0
"""Ordinary templates take a millisecond; one that loops for ever is ended here."""
CHECK_S: Final = 5.0
"""64 KiB of schema took 0.6 s at most on a busy core; a first one waits for the table of tokens too, 0.3 s."""
CHECKED: Final = 32
"""Grammars that are known to be good, 64 KiB each: a program asks with the same few."""
GOODBYE_S: Final = 1.0
"""For the process to end by itself."""

_MODULE: Final = "meshnode.app.tokenizer_main"
_LOG = logging.getLogger("meshnode.tokenizer")


class Tokenizer:
    """One model's tokenizer; `open_tokenizer` starts and ends it."""

    def __init__(self, nursery: trio.Nursery, path: Path) -> None:
        self._nursery = nursery
        self._path = path
        self._turn = trio.Lock()
        self._child: ChildProcess | None = None
        self._vocabulary: Vocabulary | None = None
        self._checker: Tokenizer | None = None
        """Compiles grammars in a process of its own: a hostile one costs other grammars time, and no prompt any."""
        self._checked: OrderedDict[Check, str] = OrderedDict()
        self.restarts = 0
        """How often the process had to be replaced."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What the model's tokens say."""
        assert self._vocabulary is not None, "the tokenizer was not started"
        return self._vocabulary

    async def start(self) -> None:
        """Start the process and load the vocabulary. ModelError when the file has none that can be read."""
        async with self._turn:
            await self._ensure()

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> tuple[int, ...]:
        """Token ids. InvalidRequest (too long), StageError (native code failed on this text)."""
        reply = await self._ask(Tokenize(text, add_special, parse_special), TOKENIZE_S)
        assert isinstance(reply, Tokens), "the tokenizer answers in order"
        return reply.ids

    async def render(self, conversation: Conversation) -> str:
        """A chat as prompt text. InvalidRequest (the template refuses), StageError (the template failed)."""
        reply = await self._ask(Render(conversation), RENDER_S)
        assert isinstance(reply, Rendered), "the tokenizer answers in order"
        return reply.text

    async def check_grammar(self, grammar: str, *, gbnf: bool = False) -> str:
        """The grammar as stages read it, from llama.cpp's GBNF or from that itself.

        InvalidRequest for one that no answer can keep to, or that costs too much.
        """
        request = Check(grammar, gbnf)
        if (known := self._checked.get(request)) is not None:
            self._checked.move_to_end(request)
            return known
        if self._checker is None:
            self._checker = Tokenizer(self._nursery, self._path)
        try:
            reply = await self._checker._ask(request, CHECK_S)
        except StageError as error:
            raise InvalidRequest(f"no answer can be made to keep to this: {error}") from None
        assert isinstance(reply, Checked), "the tokenizer answers in order"
        self._checked[request] = reply.grammar
        while len(self._checked) > CHECKED:
            self._checked.popitem(last=False)
        return reply.grammar

    async def aclose(self) -> None:
        """End the process."""
        if (checker := self._checker) is not None:
            self._checker = None
            await checker.aclose()
        if (child := self._child) is None:
            return
        self._child = None
        with trio.move_on_after(GOODBYE_S, shield=True):
            try:
                await _send(child, encode(Shutdown()))
                await child.ended.wait()
            except StageLost:
                pass
        await child.aclose()

    async def _ask(self, request: Request, within_s: float) -> Reply:
        try:
            encoded = encode(request)
        except UnicodeEncodeError:
            raise InvalidRequest("the text is not valid Unicode") from None
        except (OverflowError, RecursionError):
            # What JSON can say and a message cannot: 2**64, or lists a thousand deep.
            raise InvalidRequest(
                "a number beyond 64 bits, or too deep a structure, cannot reach the template"
            ) from None
        if not fits(encoded):
            raise InvalidRequest("the text is too long")
        async with self._turn:
            child = await self._ensure()
            return _checked(await self._exchange(child, encoded, within_s))

    async def _ensure(self) -> ChildProcess:
        """The process, started anew if the last one ended."""
        if self._child is not None and not self._child.ended.is_set():
            return self._child
        self.restarts += self._vocabulary is not None
        child = await ChildProcess.start(self._nursery, "the tokenizer", _MODULE, {})
        self._child = child
        try:
            reply = _checked(await self._exchange(child, encode(Open(str(self._path))), OPEN_S))
        except StageError as error:
            reason = str(error) if error.reason == "model" else f"{self._path.name}: llama.cpp failed on its vocabulary"
            raise ModelError(reason, NEWER) from error
        assert isinstance(reply, Described), "the tokenizer answers in order"
        self._vocabulary = reply.vocabulary
        return child

    async def _exchange(self, child: ChildProcess, encoded: bytes, within_s: float) -> Reply:
        """One reply, also for a caller who was cancelled: a client that leaves must not cost the others the process.

        On any other outcome the process is ended: its replies have no ids.
        """
        try:
            with trio.fail_after(within_s, shield=True):
                await _send(child, encoded)
                return await _receive(child)
        except StageLost as lost:
            await child.aclose()
            await trio.lowlevel.checkpoint_if_cancelled()  # a node that leaves ended it: no failure to tell
            _LOG.warning("the tokenizer ended: %s", child.lost())
            raise StageError("tokenizer_crashed", "the tokenizer failed on this input") from lost
        except trio.TooSlowError as slow:
            await child.aclose()
            await trio.lowlevel.checkpoint_if_cancelled()
            raise StageError("tokenizer_stuck", f"the tokenizer had no answer within {within_s:.0f} s") from slow


NEWER = "Download or convert the file again; a model newer than this version needs a newer meshnode."


@asynccontextmanager
async def open_tokenizer(nursery: trio.Nursery, path: Path) -> AsyncIterator[Tokenizer]:
    """A running tokenizer for the GGUF at `path`: a whole model, or its key-values only.

    Its process is watched in `nursery` and ends with the block. ModelError when the vocabulary cannot be loaded.
    """
    tokenizer = Tokenizer(nursery, path)
    try:
        await tokenizer.start()
        yield tokenizer
    finally:
        await tokenizer.aclose()


def _checked(reply: Reply) -> Reply:
    if isinstance(reply, Refused):
        if reply.kind == "request":
            raise InvalidRequest(reply.message)
        raise StageError(reply.kind, reply.message)
    return reply


async def _send(child: ChildProcess, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[await child.connection.send(view) :]
    except (OSError, trio.ClosedResourceError):
        raise StageLost("the tokenizer is gone") from None


async def _receive(child: ChildProcess) -> Reply:
    length = int.from_bytes(await _read(child, LENGTH_BYTES))
    if length > MESSAGE_BYTES:
        raise StageLost("the tokenizer sent what it may not send")
    try:
        return decode_reply(await _read(child, length))
    except msgspec.MsgspecError:
        raise StageLost("the tokenizer sent what it may not send") from None


async def _read(child: ChildProcess, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        try:
            piece = await child.connection.recv(min(size - len(data), 1 << 20))
        except (OSError, trio.ClosedResourceError):
            piece = b""
        if not piece:
            raise StageLost("the tokenizer is gone")
        data += piece
    return bytes(data)
