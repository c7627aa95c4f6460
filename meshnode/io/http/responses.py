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

from meshnode.core.serving.calls import Call
from meshnode.errors import InvalidRequest
from meshnode.io.http.answer import json_response
from meshnode.io.http.backend import ServedModel
from meshnode.io.http.body import decode
from meshnode.io.http.choice import Delta
from meshnode.io.http.failure import Dialect
from meshnode.io.http.fields import MESSAGES, ChatRequest, JsonFormat, ResponseFormat
from meshnode.io.http.generation import GenerationRoutes
from meshnode.io.http.prompt import chat_prompt
from meshnode.io.http.shapes import Json, call_id
from meshnode.io.http.turns import CalledFunction, ContentPart, Function, MadeCall, Message, Tool

TEXT_PARTS: Final = frozenset({"input_text", "output_text", "text", "reasoning_text"})


class Item(msgspec.Struct, frozen=True):
    """One entry of `input`: a message, or a thought or a call of an earlier answer, or what a call gave."""

    type: str = "message"
    role: str | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class FlatTool(msgspec.Struct, frozen=True):
    """A tool, in the words of this route."""

    type: str = "function"
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(msgspec.Struct, frozen=True):
    """Which shape the text must have: what `response_format` of a chat says, without the level in between."""

    type: str = "text"
    name: str | None = None
    schema: Any = None
    strict: bool | None = None


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
    tools: list[FlatTool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
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
        if self.top_logprobs:
            raise InvalidRequest("top_logprobs is not supported here; chat/completions has it", "top_logprobs")
        return ChatRequest(
            messages=self._messages(),
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stream=self.stream,
            reasoning_effort=self.reasoning.effort if self.reasoning is not None else None,
            tools=[
                Tool(Function(tool.name, tool.description, tool.parameters, tool.strict), tool.type)
                for tool in self.tools or ()
            ],
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self._format(),
        )

    def _format(self) -> ResponseFormat | None:
        given = self.text.format if self.text is not None else None
        if given is None or given.type != "json_schema":
            return None if given is None else ResponseFormat(given.type)
        return ResponseFormat(given.type, JsonFormat(given.name, given.schema, given.strict))

    def _messages(self) -> list[Message]:
        head = [Message("system", self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*head, Message("user", self.input)]
        if not 1 <= len(self.input) <= MESSAGES:
            raise InvalidRequest(f"input must hold between 1 and {MESSAGES} items", "input")
        turns: list[Message] = []
        thought: str | None = None
        for number, item in enumerate(self.input):
            if item.type == "reasoning":
                thought = _text(item.content, f"input[{number}].content") or None
                continue
            turn = _turn(item, f"input[{number}]", thought)
            thought = None
            if turn.tool_calls and turns and turns[-1].role == "assistant":
                # A call belongs to the answer that it is part of.
                calls = [*(turns[-1].tool_calls or ()), *turn.tool_calls]
                turns[-1] = msgspec.structs.replace(turns[-1], tool_calls=calls)
            else:
                turns.append(turn)
        return [*head, *turns]


class ResponsesRoutes:
    """responses and responses/input_tokens, for a model served here."""

    def __init__(self, generation: GenerationRoutes) -> None:
        self._generation = generation

    async def respond(self, model: ServedModel, body: bytes) -> Response:
        """POST responses."""
        asked = decode(body, ResponsesRequest)
        try:
            return await self._generation.converse(
                model, asked.as_chat(), lambda prompt_tokens: ResponsesShape(model.id, asked)
            )
        except InvalidRequest as refusal:
            if refusal.param != "response_format":
                raise
            raise InvalidRequest(str(refusal).replace("response_format", "text.format"), "text.format") from None

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
        for call in delta.calls:
            events += [*self._end(), *self._call(call)]
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

    def _call(self, call: Call) -> list[Json]:
        """A call is whole when it comes; clients still expect it piece by piece."""
        item = {"type": "function_call", "id": call_id("fc"), "call_id": call_id("call"), "name": call.name}
        place = {"item_id": item["id"], "output_index": len(self._items)}
        done = {**item, "arguments": call.arguments, "status": "completed"}
        begun = {**item, "arguments": "", "status": "in_progress"}
        self._items.append(done)
        event = "response.function_call_arguments"
        return [
            self._event("response.output_item.added", output_index=place["output_index"], item=begun),
            self._event(f"{event}.delta", **place, delta=call.arguments),
            self._event(f"{event}.done", **place, arguments=call.arguments, name=call.name),
            self._event("response.output_item.done", output_index=place["output_index"], item=done),
        ]

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
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning is not None else None, "summary": None},
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": _shown(asked.text)},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": _usage(counts) if counts is not None else None,
        }


_WORDS: Final = {"reasoning": "response.reasoning_text", "message": "response.output_text"}


def _shown(text: TextOptions | None) -> TextFormat | Json:
    given = text.format if text is not None else None
    return {"type": given.type if given is not None else "text"} if given is None or given.schema is None else given


def _turn(item: Item, place: str, thought: str | None) -> Message:
    match item.type:
        case "message":
            text = _text(item.content, f"{place}.content")
            return Message(item.role or "user", text, reasoning_content=thought)
        case "function_call":
            made = MadeCall(CalledFunction(item.name or "", item.arguments or "{}"), item.call_id)
            return Message("assistant", None, tool_calls=[made], reasoning_content=thought)
        case "function_call_output":
            return Message("tool", _text(item.output, f"{place}.output"), tool_call_id=item.call_id or "")
    raise InvalidRequest(f"an item of type `{item.type[:32]}` is not supported", f"{place}.type")


def _text(content: str | list[ContentPart] | None, place: str) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    for part in content:
        if part.type not in TEXT_PARTS or part.text is None:
            raise InvalidRequest(f"content of type `{part.type[:32]}` is not supported, only text", place)
    return "\n".join(part.text or "" for part in content)


def _item(kind: str) -> Json:
    if kind == "reasoning":
        content = [{"type": "reasoning_text", "text": ""}]
        return {
            "type": kind,
            "id": f"rs_{secrets.token_hex(12)}",
            "summary": [],
            "content": content,
            "status": "in_progress",
        }
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
