"""The tokenizer over HTTP, for programs that know llama-server's shape or vLLM's: each answer holds both.

Invariant: nothing here takes a lane, and what an answer holds is bounded before it is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import trio
from starlette.responses import Response

from meshnode.core.serving.text import Conversation, Vocabulary
from meshnode.errors import InvalidRequest
from meshnode.io.http.answer import json_response
from meshnode.io.http.backend import ServedModel
from meshnode.io.http.body import decode
from meshnode.io.http.fields import ChatRequest, Conversing
from meshnode.io.http.prompt import chat_prompt, check_ids

DETOKENIZED_IDS: Final = 1024 * 1024
"""As many as the longest text that is tokenized (4 MiB) has in English."""
DETOKENIZED_BYTES: Final = 32 * 1024 * 1024
"""A vocabulary comes from an untrusted file: a piece of a megabyte, asked for a million times, is no answer."""

THREADS: Final = 2
"""Of long lists at once: the threads that a node shares also write its state to disk."""


class TokenizeRequest(Conversing, frozen=True, kw_only=True):
    """POST tokenize: llama-server's `content` or vLLM's `prompt` or `messages`."""

    content: str | None = None
    prompt: str | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None
    return_token_strs: bool | None = None

    def special(self, default: bool) -> bool:
        """Whether the model's own first tokens are added: each family has its name and its default."""
        given = self.add_special if self.add_special is not None else self.add_special_tokens
        return default if given is None else given


class DetokenizeRequest(msgspec.Struct, frozen=True):
    """POST detokenize."""

    tokens: list[int]


class TokenRoutes:
    """tokenize, detokenize, tokenizer_info, apply-template, for a model served here."""

    def __init__(self) -> None:
        self._threads = trio.CapacityLimiter(THREADS)

    async def tokenize(self, model: ServedModel, body: bytes) -> Response:
        """POST tokenize."""
        asked = decode(body, TokenizeRequest)
        ids = await self._ids(model, asked)
        made = await trio.to_thread.run_sync(_tokenized, model.vocabulary, ids, asked, limiter=self._threads)
        return json_response({**made, "count": len(ids), "max_model_len": model.context})

    async def detokenize(self, model: ServedModel, body: bytes) -> Response:
        """POST detokenize: control tokens are written out, so that tokenizing gives the same ids again."""
        ids = decode(body, DetokenizeRequest).tokens
        if len(ids) > DETOKENIZED_IDS:
            raise InvalidRequest(f"tokens has {len(ids)} ids, at most {DETOKENIZED_IDS} are turned into text", "tokens")
        text = await trio.to_thread.run_sync(_written, model.vocabulary, ids, limiter=self._threads)
        return json_response({"content": text, "prompt": text})

    async def info(self, model: ServedModel, query: Mapping[str, str]) -> Response:
        """GET tokenizer_info: what lm-eval reads instead of a tokenizer's files."""
        vocabulary = model.vocabulary
        known = {
            "tokenizer_class": "meshnode",
            "model": model.id,
            "model_max_length": model.context,
            "vocab_size": len(vocabulary.pieces),
            "add_bos_token": vocabulary.add_bos,
            "bos_token": _name(vocabulary, vocabulary.bos),
            "eos_token": _name(vocabulary, vocabulary.eos),
            "pad_token": _name(vocabulary, vocabulary.eos),
            "bos_token_id": vocabulary.bos if vocabulary.bos >= 0 else None,
            "eos_token_id": vocabulary.eos if vocabulary.eos >= 0 else None,
            "chat_template": vocabulary.chat_template or None,
            "fingerprint": vocabulary.fingerprint,
        }
        return json_response(known)

    async def apply_template(self, model: ServedModel, body: bytes) -> Response:
        """POST apply-template: the prompt of a chat, not computed."""
        asked = decode(body, ChatRequest)
        return json_response({"prompt": await model.render(asked.as_conversation())})

    async def _ids(self, model: ServedModel, asked: TokenizeRequest) -> tuple[int, ...]:
        given = [name for name in ("content", "prompt", "messages") if getattr(asked, name) is not None]
        if len(given) != 1:
            raise InvalidRequest("exactly one of content, prompt and messages is needed", given[-1] if given else None)
        if asked.messages is not None:
            return await _chat_ids(model, asked, asked.as_conversation())
        parse = asked.parse_special is not False
        if asked.content is not None:
            return await model.tokenize(asked.content, add_special=asked.special(False), parse_special=parse)
        return await model.tokenize(asked.prompt or "", add_special=asked.special(True), parse_special=parse)


async def _chat_ids(model: ServedModel, asked: TokenizeRequest, conversation: Conversation) -> tuple[int, ...]:
    """As a chat of the same messages is tokenized, unless the client decides about the first tokens itself."""
    if asked.add_special is None and asked.add_special_tokens is None:
        return (await chat_prompt(model, conversation))[1]
    text = await model.render(conversation)
    return await model.tokenize(text, add_special=asked.special(False), parse_special=True)


def _tokenized(vocabulary: Vocabulary, ids: Sequence[int], asked: TokenizeRequest) -> dict[str, Any]:
    written = [vocabulary.written(token) for token in ids] if asked.with_pieces or asked.return_token_strs else []
    if sum(map(len, written)) > DETOKENIZED_BYTES:
        raise InvalidRequest("the pieces of these tokens are too long for an answer")
    strings = [piece.decode("utf-8", "replace") for piece in written] if asked.return_token_strs else None
    if not asked.with_pieces:
        return {"tokens": ids, "token_strs": strings}
    pieces = [{"id": token, "piece": _piece(piece)} for token, piece in zip(ids, written, strict=True)]
    return {"tokens": pieces, "token_strs": strings}


def _piece(written: bytes) -> str | list[int]:
    """llama-server's form: text, or its bytes where a token is a part of a character."""
    try:
        return written.decode()
    except UnicodeDecodeError:
        return list(written)


def _written(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    check_ids(ids, vocabulary, "tokens")
    pieces = [vocabulary.written(token) for token in ids]
    if sum(map(len, pieces)) > DETOKENIZED_BYTES:
        raise InvalidRequest(f"the text of these tokens has more than {DETOKENIZED_BYTES} bytes", "tokens")
    return b"".join(pieces).decode("utf-8", "replace")


def _name(vocabulary: Vocabulary, token: int) -> str | None:
    return vocabulary.written(token).decode("utf-8", "replace") if token >= 0 else None
