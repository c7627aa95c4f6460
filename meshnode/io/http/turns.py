"""Messages and tools of a conversation, as clients write them and as chat templates read them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from meshnode.errors import InvalidRequest

ROLE_CHARACTERS: Final = 64
"""Templates know system, user, assistant, tool and a few of their own."""
TOOLS: Final = 128
"""Of one request: OpenAI's bound."""

_TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message; only text is understood."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, frozen=True):
    """What an earlier answer called."""

    name: str
    arguments: str = "{}"


class MadeCall(msgspec.Struct, frozen=True):
    """A call of an earlier answer."""

    function: CalledFunction
    id: str | None = None
    type: str = "function"


class Message(msgspec.Struct, frozen=True):
    """One turn of the conversation."""

    role: str
    content: str | list[ContentPart] | UnsetType | None = UNSET
    name: str | None = None
    tool_calls: list[MadeCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(msgspec.Struct, frozen=True, omit_defaults=True):
    """What may be called."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """One of the tools of a request."""

    function: Function
    type: str = "function"

    def texts(self) -> frozenset[str]:
        """Parameters that its schema says are text."""
        properties = (self.function.parameters or {}).get("properties")
        described = properties.items() if isinstance(properties, dict) else ()
        return frozenset(name for name, each in described if isinstance(each, dict) and each.get("type") == "string")

    def shown(self) -> dict[str, Any]:
        """As templates read it: always with parameters, which many of them walk over."""
        nothing = {"type": "object", "properties": {}}
        told = {"name": self.function.name, "description": self.function.description or ""}
        return {"type": "function", "function": {**told, "parameters": self.function.parameters or nothing}}


def check_tools(tools: Sequence[Tool]) -> None:
    """InvalidRequest for tools that cannot be offered."""
    if len(tools) > TOOLS:
        raise InvalidRequest(f"tools has at most {TOOLS} entries", "tools")
    for number, tool in enumerate(tools):
        place = f"tools[{number}]"
        if tool.type != "function":
            raise InvalidRequest(
                f"a tool of type `{tool.type[:32]}` is not supported, only `function`", f"{place}.type"
            )
        if not _TOOL_NAME.fullmatch(tool.function.name):
            raise InvalidRequest(
                "a tool's name has 1 to 64 letters, digits and the signs _ . -", f"{place}.function.name"
            )


def turn_of(message: Message, place: str) -> dict[str, Any]:
    """One message for a template: content as one text, developer as system, arguments as the object that they are."""
    if not 1 <= len(message.role) <= ROLE_CHARACTERS:
        raise InvalidRequest(f"role must have between 1 and {ROLE_CHARACTERS} characters", f"{place}.role")
    content = message.content
    if content is UNSET and not message.tool_calls:
        raise InvalidRequest("a message needs content", f"{place}.content")
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise InvalidRequest(
                    f"content of type `{part.type[:32]}` is not supported, only `text`", f"{place}.content"
                )
        content = "\n".join(part.text or "" for part in content)
    turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content or ""}
    if message.tool_calls:
        turn["tool_calls"] = [_made(call) for call in message.tool_calls]
    more = {name: getattr(message, name) for name in ("name", "tool_call_id", "reasoning_content")}
    return {**turn, **{name: value for name, value in more.items() if value is not None}}


def _made(call: MadeCall) -> dict[str, Any]:
    arguments: Any = call.function.arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    function = {"name": call.function.name, "arguments": parsed if isinstance(parsed, dict) else arguments}
    return {"id": call.id or "", "type": "function", "function": function}
