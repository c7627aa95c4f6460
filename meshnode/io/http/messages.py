"""POST messages: Anthropic's route, as a chat.

Invariant: whatever would need a tool of the server, a document or a picture is refused and never dropped.
"""

from __future__ import annotations

import json
import secrets
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
from meshnode.io.http.fields import MESSAGES, ChatRequest
from meshnode.io.http.generation import GenerationRoutes
from meshnode.io.http.prompt import chat_prompt
from meshnode.io.http.shapes import Json, call_id
from meshnode.io.http.turns import CalledFunction, Function, MadeCall, Message, Tool

HIDDEN: Final = frozenset({"thinking", "redacted_thinking"})
"""Blocks of earlier answers that are not what was said."""


class Block(msgspec.Struct, frozen=True):
    """One part of a turn."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    """Of a `tool_use`."""
    tool_use_id: str | None = None
    content: str | list[Block] | None = None
    """Of a `tool_result`."""


class OfferedTool(msgspec.Struct, frozen=True):
    """A tool, in the words of this route; those that Anthropic runs itself have another type."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str = "custom"
    strict: bool | None = None


class ToolChoice(msgspec.Struct, frozen=True):
    """Whether tools are called."""

    type: str = "auto"
    """auto, any, tool (with its name), none."""
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def as_chat(self) -> Any:
        """In the words of a chat."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


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
    tools: list[OfferedTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingOptions | None = None

    def as_chat(self) -> ChatRequest:
        """The same as a chat, without what only generating needs."""
        if not 1 <= len(self.messages) <= MESSAGES:
            raise InvalidRequest(f"messages must hold between 1 and {MESSAGES} messages", "messages")
        head = [Message("system", _said(self.system, "system"))] if self.system else []
        turns = [each for number, turn in enumerate(self.messages) for each in _turns(turn, f"messages[{number}]")]
        choice = self.tool_choice or ToolChoice()
        return ChatRequest(
            messages=[*head, *turns],
            chat_template_kwargs=(
                {} if self.thinking is None else {"enable_thinking": self.thinking.type != "disabled"}
            ),
            tools=[
                Tool(
                    Function(tool.name, tool.description, tool.input_schema, tool.strict),
                    "function" if tool.type == "custom" else tool.type,
                )
                for tool in self.tools or ()
            ],
            tool_choice=choice.as_chat(),
            parallel_tool_calls=not choice.disable_parallel_tool_use,
        )


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
        for call in delta.calls:
            events += [*self._end(), *self._call(call)]
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

    def _call(self, call: Call) -> list[Json]:
        """A call is whole when it comes; clients still expect its input after its name."""
        block: Json = {"type": "tool_use", "id": call_id("toolu"), "name": call.name, "input": {}}
        self._blocks.append({**block, "input": json.loads(call.arguments)})
        self._open = "tool_use"
        begun = {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}
        return [begun, self._delta({"type": "input_json_delta", "partial_json": call.arguments}), *self._end()]

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _message(self, content: list[Json], usage: Json) -> Json:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self._model, "content": content}
        return {**head, "stop_reason": None, "stop_sequence": None, "usage": usage}

    def _stop(self) -> Json:
        assert self._last is not None, "asked after the last delta"
        if self._last.stop:
            return {"stop_reason": "stop_sequence", "stop_sequence": self._last.stop}
        reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
        return {"stop_reason": reasons.get(self._last.finish, "end_turn"), "stop_sequence": None}


def _turns(turn: Turn, place: str) -> list[Message]:
    """Results of tools are turns of their own in a chat, before what the user says with them."""
    if turn.role not in ("user", "assistant", "system"):
        raise InvalidRequest("role is one of user, assistant", f"{place}.role")
    if isinstance(turn.content, str):
        return [Message(turn.role, turn.content)]
    place = f"{place}.content"
    results = [block for block in turn.content if block.type == "tool_result"]
    calls = [block for block in turn.content if block.type == "tool_use"]
    rest = [block for block in turn.content if block.type not in ("tool_result", "tool_use")]
    made = [MadeCall(CalledFunction(call.name or "", json.dumps(call.input or {})), call.id) for call in calls]
    thought = "".join(block.thinking or "" for block in rest) or None
    said = Message(turn.role, _said(rest, place), tool_calls=made or None, reasoning_content=thought)
    given = [Message("tool", _said(block.content, place), tool_call_id=block.tool_use_id or "") for block in results]
    return [*given, said] if rest or made else given


def _said(content: str | list[Block] | None, place: str) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    for block in content:
        if block.type not in HIDDEN and (block.type != "text" or block.text is None):
            raise InvalidRequest(f"content of type `{block.type[:32]}` is not supported, only `text`", place)
    return "\n".join(block.text or "" for block in content if block.type not in HIDDEN)


def _usage_of(counts: Json) -> Json:
    cached = counts["prompt_tokens_details"]["cached_tokens"]
    return _usage(counts["prompt_tokens"], counts["completion_tokens"], cached)


def _usage(prompt_tokens: int, generated: int, cached: int = 0) -> Json:
    """Anthropic's input is without what came out of a cache; the sum is the prompt."""
    read = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": cached}
    return {"input_tokens": prompt_tokens - cached, "output_tokens": generated, **read}
