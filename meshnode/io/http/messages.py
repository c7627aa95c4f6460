"""POST messages: Anthropic's route, as a chat.

Invariant: whatever would need a tool, a document or a picture is refused and never dropped.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from starlette.responses import Response

from meshnode.errors import InvalidRequest
from meshnode.io.http.answer import json_response
from meshnode.io.http.backend import ServedModel
from meshnode.io.http.body import decode
from meshnode.io.http.choice import Delta
from meshnode.io.http.failure import Dialect
from meshnode.io.http.fields import MESSAGES, ChatRequest, Message
from meshnode.io.http.generation import GenerationRoutes
from meshnode.io.http.prompt import chat_prompt
from meshnode.io.http.shapes import Json

HIDDEN: Final = frozenset({"thinking", "redacted_thinking"})
"""Blocks of earlier answers that are not what was said."""


class Block(msgspec.Struct, frozen=True):
    """One part of a turn."""

    type: str
    text: str | None = None
    thinking: str | None = None


class Turn(msgspec.Struct, frozen=True):
    """One message."""

    role: str
    content: str | list[Block]


class ThinkingOptions(msgspec.Struct, frozen=True):
    """Whether the model may think first; how long it may is its own matter."""

    type: str


class CountRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST messages/count_tokens."""

    messages: list[Turn]
    system: str | list[Block] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    thinking: ThinkingOptions | None = None

    def as_chat(self) -> ChatRequest:
        """The same as a chat, without what only generating needs."""
        if self.tools and not (isinstance(self.tool_choice, dict) and self.tool_choice.get("type") == "none"):
            raise InvalidRequest("tool calls are not supported", "tools")
        if not 1 <= len(self.messages) <= MESSAGES:
            raise InvalidRequest(f"messages must hold between 1 and {MESSAGES} messages", "messages")
        head = [Message("system", _said(self.system, "system"))] if self.system else []
        turns = [_turn(turn, f"messages[{number}]") for number, turn in enumerate(self.messages)]
        switch = {} if self.thinking is None else {"enable_thinking": self.thinking.type != "disabled"}
        return ChatRequest(messages=[*head, *turns], chat_template_kwargs=switch)


class MessagesRequest(CountRequest, frozen=True, kw_only=True):
    """POST messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def as_chat(self) -> ChatRequest:
        """The same as a chat."""
        if self.max_tokens < 1:
            raise InvalidRequest("max_tokens must be at least 1", "max_tokens")
        return msgspec.structs.replace(
            super().as_chat(),
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            stream=self.stream,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )


class MessagesRoutes:
    """messages and messages/count_tokens, for a model served here."""

    def __init__(self, generation: GenerationRoutes) -> None:
        self._generation = generation

    async def message(self, model: ServedModel, body: bytes) -> Response:
        """POST messages."""
        chat = decode(body, MessagesRequest).as_chat()
        return await self._generation.converse(model, chat, lambda count: MessagesShape(model.id, count))

    async def count(self, model: ServedModel, body: bytes) -> Response:
        """POST messages/count_tokens."""
        conversation = decode(body, CountRequest).as_chat().as_conversation()
        _, ids = await chat_prompt(model, conversation)
        return json_response({"input_tokens": len(ids)})


class MessagesShape:
    """message, whole and as events. Blocks open with their first text and close in order."""

    dialect = Dialect.MESSAGES

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self.id = f"msg_{secrets.token_hex(12)}"
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._blocks: list[Json] = []
        self._open = ""
        self._last: Delta | None = None

    def opening(self, index: int) -> list[Json]:
        """That it began."""
        return [{"type": "message_start", "message": self._message([], _usage(self._prompt_tokens, 0))}]

    def chunks(self, delta: Delta) -> list[Json]:
        """What a thought or a text added."""
        events: list[Json] = []
        for kind, text in (("thinking", delta.thought), ("text", delta.text)):
            if text:
                events += self._begin(kind)
                self._blocks[-1][kind] += text
                events.append(self._delta({"type": f"{kind}_delta", kind: text}))
        if delta.finish:
            # Clients read the first block unasked.
            events += self._begin("text") if not self._blocks else []
            events += self._end()
            self._last = delta
        return events

    def closing(self, counts: Json) -> list[Json]:
        """Why it ended, and what it took."""
        ended = {"type": "message_delta", "delta": self._stop(), "usage": _usage_of(counts)}
        return [ended, {"type": "message_stop"}]

    def whole(self, choices: Sequence[Sequence[Delta]], counts: Json) -> Json:
        """One message."""
        for delta in choices[0]:
            self.chunks(delta)
        return {**self._message(self._blocks, _usage_of(counts)), **self._stop()}

    def _begin(self, kind: str) -> list[Json]:
        if self._open == kind:
            return []
        events = self._end()
        self._open = kind
        block: Json = {"type": kind, kind: ""}
        if kind == "thinking":
            block["signature"] = ""
        self._blocks.append(block)
        begun = {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)}
        return [*events, begun]

    def _end(self) -> list[Json]:
        if not self._open:
            return []
        self._open = ""
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _message(self, content: list[Json], usage: Json) -> Json:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self._model, "content": content}
        return {**head, "stop_reason": None, "stop_sequence": None, "usage": usage}

    def _stop(self) -> Json:
        assert self._last is not None, "asked after the last delta"
        if self._last.stop:
            return {"stop_reason": "stop_sequence", "stop_sequence": self._last.stop}
        reason = "max_tokens" if self._last.finish == "length" else "end_turn"
        return {"stop_reason": reason, "stop_sequence": None}


def _turn(turn: Turn, place: str) -> Message:
    if turn.role not in ("user", "assistant", "system"):
        raise InvalidRequest("role is one of user, assistant", f"{place}.role")
    thought = None
    if not isinstance(turn.content, str):
        thought = "".join(block.thinking or "" for block in turn.content) or None
    return Message(turn.role, _said(turn.content, f"{place}.content"), reasoning_content=thought)


def _said(content: str | list[Block] | None, place: str) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    for block in content:
        if block.type not in HIDDEN and (block.type != "text" or block.text is None):
            raise InvalidRequest(f"content of type `{block.type[:32]}` is not supported, only `text`", place)
    return "\n".join(block.text or "" for block in content if block.type not in HIDDEN)


def _usage_of(counts: Json) -> Json:
    return _usage(counts["prompt_tokens"], counts["completion_tokens"])


def _usage(prompt_tokens: int, generated: int) -> Json:
    cached = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    return {"input_tokens": prompt_tokens, "output_tokens": generated, **cached}
