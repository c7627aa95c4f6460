"""Tool calls in what a model says: told from text by the format that the model's chat template teaches it.

Invariant: a call comes out when it is whole and names a known tool, and never otherwise: what was cut off or is no
JSON stays text. What comes out, joined, does not depend on how the text was cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Final, NoReturn

import msgspec

from meshnode.core.serving.text import overlap

CALLS: Final = 64
"""Of one answer: agents ask for a handful at once; what follows stays text."""


class Format(Enum):
    """How a family writes its calls; the value is what begins one."""

    TAGGED = "<tool_call>"
    """Hermes, Qwen: one JSON object between two tags, as often as needed; Qwen3-Coder: a function with parameters, each
    between tags of its own."""
    LISTED = "[TOOL_CALLS]"
    """Mistral: a JSON list up to the end, or `name[ARGS]{...}` one after the other."""
    BARE = "{"
    """Llama 3 and models without a format of their own: the whole answer is one JSON object, or several."""


TAGGED_END: Final = "</tool_call>"
ARGUMENTS: Final = "[ARGS]"
CALL_ID: Final = "[CALL_ID]"
TAGS: Final = frozenset(
    tag.encode() for tag in (Format.TAGGED.value, TAGGED_END, Format.LISTED.value, ARGUMENTS, CALL_ID)
)
"""Written out also where a vocabulary hides them, as it does with control tokens."""


_FUNCTION: Final = re.compile(r"\s*<function=([^>\s]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER: Final = re.compile(r"\s*<parameter=([^>\s]+)>\n?(.*?)\n?", re.DOTALL)


class Call(msgspec.Struct, frozen=True):
    """One whole call."""

    name: str
    arguments: str
    """A JSON object."""
    more: bool = False
    """The arguments go on with those of the call before, which has the same name."""


def format_of(template: str) -> Format | None:
    """None for a template that says nothing of tools, or in a way that is not known here."""
    if "tools" not in template or "<|channel|>" in template:
        return None
    for known in (Format.LISTED, Format.TAGGED):
        if known.value in template:
            return known
    return Format.BARE


class CallSplitter:
    """Text in, (text, calls) out. White space beside a call is dropped."""

    def __init__(self, known: Format, tools: Mapping[str, frozenset[str]]) -> None:
        """`tools`: names that may be called, each with those of its parameters that are text."""
        self._format = known
        self._tools = tools
        self._held = ""
        self._space = ""
        """White space before the call that is being read: dropped with it, shown if it is none."""
        self._in_call = False
        self._said = False
        """Whether text came out that is no white space: a bare call can only be the whole answer."""
        self.calls = 0

    def feed(self, text: str) -> tuple[str, list[Call]]:
        """What is certain after `text`."""
        self._held += text
        said = ""
        calls: list[Call] = []
        while True:
            if not self._in_call:
                said += self._until_call()
            if not self._in_call or self._format is not Format.TAGGED:
                return said, calls
            body, ended, after = self._held.partition(TAGGED_END)
            if not ended:
                return said, calls
            self._held, self._in_call = after, False
            inner = body.removeprefix(Format.TAGGED.value)
            found = self._known(_objects(inner) or _functions(inner, self._tools))
            calls += found
            if not found:
                said += self._speak(self._space + body + ended)

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back; an answer that ended within a call has not made it."""
        rest, self._held = self._held, ""
        space = self._space if self._in_call else ""
        calls: list[Call] = []
        if self._in_call and self._format is Format.LISTED:
            calls = self._known(_listed(rest.removeprefix(Format.LISTED.value)))
        elif self._in_call and self._format is Format.BARE:
            calls = self._known(_objects(rest))
        self._in_call = False
        if calls or (self.calls and not rest.strip()):
            return "", calls
        return space + rest, []

    def _until_call(self) -> str:
        """Text before the next call; white space before it waits."""
        held, begin = self._held, self._format.value
        if self._format is Format.BARE:
            start = held.lstrip()
            self._in_call = not self._said and start.startswith(begin)
            if self._in_call or not start:
                return ""
            at = len(held)
        else:
            at = held.find(begin)
            self._in_call = at >= 0 and self.calls < CALLS
            if not self._in_call:
                at = len(held) - overlap(held, begin)
        text = held[:at].rstrip()
        self._space = held[len(text) : at]
        self._held = held[at:] if self._in_call else held[len(text) :]
        return self._speak(text) if text else ""

    def _speak(self, text: str) -> str:
        self._said = self._said or bool(text.strip())
        return text

    def _known(self, found: Sequence[Call]) -> list[Call]:
        """All of them, if all are of known tools; else none, and the text stays text."""
        if len(found) + self.calls > CALLS or any(call.name not in self._tools for call in found):
            return []
        self.calls += len(found)
        return list(found)


def _objects(text: str) -> list[Call]:
    """One JSON object or several, with nothing but white space or semicolons between; [] for anything else."""
    return _calls_of(_values(text))


def _functions(text: str, tools: Mapping[str, frozenset[str]]) -> list[Call]:
    """Qwen3-Coder's: only the schema tells the text 5 from the number."""
    found = _FUNCTION.fullmatch(text)
    if found is None:
        return []
    texts, given = tools.get(found[1], frozenset()), {}
    *parts, rest = found[2].split("</parameter>")
    if rest.strip():
        return []
    for part in parts:
        begun = _PARAMETER.fullmatch(part)
        if begun is None:
            return []
        given[begun[1]] = _value(begun[2], begun[1] in texts)
    return [Call(found[1], _written(given))]


def _value(given: str, is_text: bool) -> Any:
    values = None if is_text else _values(given)
    return values[0] if values and len(values) == 1 else given


def _listed(text: str) -> list[Call]:
    """Mistral's: a list of objects, or names with arguments."""
    if text.lstrip().startswith("["):
        values = _values(text)
        return _calls_of(values[0]) if values and len(values) == 1 and isinstance(values[0], list) else []
    calls = []
    for part in text.split(Format.LISTED.value):
        name, found, arguments = part.partition(ARGUMENTS)
        values = _values(arguments) if found else None
        if values is None or len(values) != 1 or not isinstance(values[0], dict):
            return []
        calls.append(Call(name.partition(CALL_ID)[0].strip(), _written(values[0])))
    return calls


def _calls_of(values: Sequence[Any] | None) -> list[Call]:
    calls = []
    for value in values or ():
        call = _call_of(value)
        if call is None:
            return []
        calls.append(call)
    return calls


def _call_of(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    given = value.get("arguments", value.get("parameters", {}))
    if isinstance(given, str):
        inner = _values(given)
        given = inner[0] if inner and len(inner) == 1 else None
    return Call(value["name"], _written(given)) if isinstance(given, dict) else None


def _written(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _values(text: str) -> list[Any] | None:
    """All JSON values of a text; None where something else is in it."""
    try:
        return list(_decoded(text))
    except (ValueError, RecursionError):
        return None


def _decoded(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder(parse_constant=_no_number)
    rest = text.strip()
    count = 0
    while rest:
        count += 1
        if count > CALLS:
            raise ValueError("more values than calls")
        value, end = decoder.raw_decode(rest)
        yield value
        rest = rest[end:].lstrip(" \t\r\n;")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
