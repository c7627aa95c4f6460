"""The tokenizer process: `python -m meshnode.app.tokenizer_main <fd>`.

Holds one model's vocabulary and chat template, answers one request after the other over the inherited socket, and
ends with its parent. Native code may end it at any time: the parent starts another one.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from meshnode.core.serving.text import Vocabulary
from meshnode.errors import InvalidRequest, ModelError, StageError
from meshnode.io.llama.chat_template import ChatTemplate
from meshnode.io.llama.vocabulary import LoadedVocabulary
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
    decode_request,
    encode,
    fits,
)

if TYPE_CHECKING:
    from meshnode.io.llama.grammar import Grammars

GRAMMAR_MEMORY: Final = 1024**3
"""Address space that the table of tokens and a grammar may add: 60 MB and, for the worst that was found, 180 MB."""
TEMPLATE_MEMORY: Final = 512 * 1024**2
"""Address space that rendering may add: a template that fills memory ends here, not in the machine's last page."""


class TokenizerProcess:
    """Requests in, replies out."""

    def __init__(self) -> None:
        self._vocabulary: LoadedVocabulary | None = None
        self._template: ChatTemplate | None = None
        self._described: Vocabulary | None = None
        self._grammars: Grammars | None = None

    def answer(self, request: Request) -> Reply | None:
        """The reply; None after Shutdown."""
        try:
            match request:
                case Open():
                    return self._open(Path(request.path))
                case Tokenize() if self._vocabulary is not None:
                    special = {"add_special": request.add_special, "parse_special": request.parse_special}
                    return Tokens(self._vocabulary.tokenize(request.text, **special))
                case Render() if self._template is not None:
                    with _limited_memory(TEMPLATE_MEMORY):
                        return Rendered(self._template.render(request.conversation))
                case Check() if self._described is not None:
                    with _limited_memory(GRAMMAR_MEMORY):
                        return self._check(request)
                case Shutdown():
                    return None
                case _:
                    return Refused("request", "no vocabulary is open")
        except ModelError as error:
            return Refused("model", str(error))
        except InvalidRequest as error:
            return Refused("request", str(error))
        except StageError as error:
            return Refused(error.reason, str(error))

    def _open(self, path: Path) -> Described:
        self._vocabulary = LoadedVocabulary(path)
        described = self._described = self._vocabulary.describe()
        self._template = ChatTemplate(described)
        return Described(described)

    def _check(self, request: Check) -> Checked:
        """StageError(GRAMMAR_REFUSED) for a grammar that cannot be kept to."""
        from meshnode.io.llama.grammar import Grammars, translated

        assert self._described is not None, "asked after Open"
        if self._grammars is None:
            self._grammars = Grammars(self._described)
        grammar = translated(request.grammar) if request.gbnf else request.grammar
        self._grammars.check(grammar)
        return Checked(grammar)


@contextmanager
def _limited_memory(more: int) -> Iterator[None]:
    """At most `more` bytes beyond what is in use, where the system can say so; the parent's deadline holds anywhere."""
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _read(connection: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes; EOFError when the parent is gone."""
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _end_with(connection: socket.socket) -> None:
    """Leave at once when the parent is gone, also in the middle of a template that loops for ever."""
    watched = select.poll()
    watched.register(connection, 0)
    watched.poll()
    os._exit(0)


def main() -> int:
    """Serve until Shutdown or until the parent is gone."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    process = TokenizerProcess()
    try:
        while True:
            length = int.from_bytes(_read(connection, LENGTH_BYTES))
            if length > MESSAGE_BYTES:
                return 1
            reply = process.answer(decode_request(_read(connection, length)))
            if reply is None:
                return 0
            encoded = encode(reply)
            connection.sendall(encoded if fits(encoded) else encode(Refused("request", "the answer is too long")))
    except (EOFError, OSError):
        return 0
    except msgspec.MsgspecError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
