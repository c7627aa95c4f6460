"""POST responses: OpenAI's newer route, stateless, as a chat.

Invariant: whatever would need a memory of earlier answers, a tool or a picture is refused and never dropped.
"""

from __future__ import annotations

import secrets
import time
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
from meshnode.io.http.fields import MESSAGES, ChatRequest, ContentPart, Message
from meshnode.io.http.generation import GenerationRoutes
from meshnode.io.http.prompt import chat_prompt
from meshnode.io.http.shapes import Json

TEXT_PARTS: Final = frozenset({"input_text", "output_text", "text"})


class Item(msgspec.Struct, frozen=True):
    """One entry of `input`: a message, or a thought of an earlier answer."""

    type: str = "message"
    role: str | None = None
    content: str | list[ContentPart] | None = None


class TextFormat(msgspec.Struct, frozen=True):
    """Which shape the text must have."""

    type: str = "text"


class TextOptions(msgspec.Struct, frozen=True):
    """How the text is given."""

    format: TextFormat | None = None


class Reasoning(msgspec.Struct, frozen=True):
    """How much to think."""

    effort: str | None = None


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST responses."""

    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    top_logprobs: int | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None

    def as_chat(self) -> ChatRequest:
        """The same as a chat. InvalidRequest for what a stateless answer cannot be."""
        for name in ("previous_response_id", "conversation", "prompt", "background"):
            if getattr(self, name):
                why = "nothing is kept between requests: send the whole conversation as `input`"
                raise InvalidRequest(f"{name} is not supported; {why}", name)
        if self.tools and self.tool_choice != "none":
            raise InvalidRequest("tool calls are not supported", "tools")
        if self.top_logprobs:
            raise InvalidRequest("top_logprobs is not supported here; chat/completions has it", "top_logprobs")
        if self.text is not None and self.text.format is not None and self.text.format.type != "text":
            raise InvalidRequest("only text.format `text` is supported", "text.format")
        return ChatRequest(
            messages=self._messages(),
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stream=self.stream,
            reasoning_effort=self.reasoning.effort if self.reasoning is not None else None,
        )

    def _messages(self) -> list[Message]:
        head = [Message("system", self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*head, Message("user", self.input)]
        if not 1 <= len(self.input) <= MESSAGES:
            raise InvalidRequest(f"input must hold between 1 and {MESSAGES} items", "input")
        turns: list[Message] = []
        thought: str | None = None
        for number, item in enumerate(self.input):
            text = _text(item, f"input[{number}]")
            if item.type == "reasoning":
                thought = text or None
            else:
                turns.append(Message(item.role or "user", text, reasoning_content=thought))
                thought = None
        return [*head, *turns]


class ResponsesRoutes:
    """responses and responses/input_tokens, for a model served here."""

    def __init__(self, generation: GenerationRoutes) -> None:
        self._generation = generation

    async def respond(self, model: ServedModel, body: bytes) -> Response:
        """POST responses."""
        asked = decode(body, ResponsesRequest)
        return await self._generation.converse(
            model, asked.as_chat(), lambda prompt_tokens: ResponsesShape(model.id, asked)
        )

    async def count(self, model: ServedModel, body: bytes) -> Response:
        """POST responses/input_tokens."""
        conversation = decode(body, ResponsesRequest).as_chat().as_conversation()
        _, ids = await chat_prompt(model, conversation)
        return json_response({"object": "response.input_tokens", "input_tokens": len(ids)})


class ResponsesShape:
    """response, whole and as events. Each event has its number; the items of `output` open and close in order."""

    dialect = Dialect.RESPONSES

    def __init__(self, model: str, asked: ResponsesRequest) -> None:
        self.id = f"resp_{secrets.token_hex(12)}"
        self._model = model
        self._asked = asked
        self._created = int(time.time())
        self._number = -1
        self._finish = ""
        self._items: list[Json] = []
        """Closed items, and at most one open one at the end."""
        self._open = ""

    def opening(self, index: int) -> list[Json]:
        """That it began."""
        began = self._response("in_progress", [], None)
        return [self._event("response.created", response=began), self._event("response.in_progress", response=began)]

    def chunks(self, delta: Delta) -> list[Json]:
        """What a thought or a text added; items open with their first text."""
        events: list[Json] = []
        for kind, text in (("reasoning", delta.thought), ("message", delta.text)):
            if text:
                events += self._begin(kind)
                self._part()["text"] += text
                events.append(self._event(f"{_WORDS[kind]}.delta", **self._place(), delta=text, **_logprobs(kind)))
        if delta.finish:
            events += self._begin("message") if not self._items else []
            events += self._end(_status(delta.finish))
            self._finish = delta.finish
        return events

    def closing(self, counts: Json) -> list[Json]:
        """The whole answer once more."""
        whole = self._response(_status(self._finish), self._items, counts)
        return [self._event(f"response.{whole['status']}", response=whole)]

    def whole(self, choices: Sequence[Sequence[Delta]], counts: Json) -> Json:
        """As the last event of a stream has it."""
        for delta in choices[0]:
            self.chunks(delta)
        return self._response(_status(self._finish), self._items, counts)

    def _begin(self, kind: str) -> list[Json]:
        if self._open == kind:
            return []
        events = self._end()
        self._open = kind
        self._items.append(_item(kind))
        # What is opened fills up later: the event shows it empty.
        empty = {**self._items[-1], "content": []}
        events.append(self._event("response.output_item.added", output_index=len(self._items) - 1, item=empty))
        if kind == "message":
            events.append(self._event("response.content_part.added", **self._place(), part=dict(self._part())))
        return events

    def _end(self, status: str = "completed") -> list[Json]:
        if not self._open:
            return []
        item, part, kind, self._open = self._items[-1], self._part(), self._open, ""
        item["status"] = status
        events = [self._event(f"{_WORDS[kind]}.done", **self._place(), text=part["text"], **_logprobs(kind))]
        if kind == "message":
            events.append(self._event("response.content_part.done", **self._place(), part=part))
        return [*events, self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)]

    def _part(self) -> Json:
        part: Json = self._items[-1]["content"][0]
        return part

    def _place(self) -> Json:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _event(self, kind: str, **more: Any) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **more}

    def _response(self, status: str, output: list[Json], counts: Json | None) -> Json:
        asked = self._asked
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._finish == "length" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": {},
            "model": self._model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning is not None else None, "summary": None},
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": _usage(counts) if counts is not None else None,
        }


_WORDS: Final = {"reasoning": "response.reasoning_text", "message": "response.output_text"}


def _text(item: Item, place: str) -> str:
    if item.type not in ("message", "reasoning"):
        raise InvalidRequest(f"an item of type `{item.type[:32]}` is not supported", f"{place}.type")
    if isinstance(item.content, str) or item.content is None:
        return item.content or ""
    for part in item.content:
        known = TEXT_PARTS if item.type == "message" else {"reasoning_text"}
        if part.type not in known or part.text is None:
            raise InvalidRequest(f"content of type `{part.type[:32]}` is not supported, only text", f"{place}.content")
    return "\n".join(part.text or "" for part in item.content)


def _item(kind: str) -> Json:
    if kind == "reasoning":
        content = [{"type": "reasoning_text", "text": ""}]
        return {"type": kind, "id": f"rs_{secrets.token_hex(12)}", "summary": [], "content": content, "status": "in_progress"}
    content_of: list[Json] = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
    name = f"msg_{secrets.token_hex(12)}"
    return {"type": kind, "id": name, "status": "in_progress", "role": "assistant", "content": content_of}


def _logprobs(kind: str) -> Json:
    return {"logprobs": []} if kind == "message" else {}


def _status(finish: str) -> str:
    return "incomplete" if finish == "length" else "completed"


def _usage(counts: Json) -> Json:
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": counts["prompt_tokens_details"],
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": counts["completion_tokens_details"],
        "total_tokens": counts["total_tokens"],
    }
