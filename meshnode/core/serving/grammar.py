"""What an answer must keep to, written in llguidance's variant of Lark: JSON, a schema, calls of tools.

White space is fixed but for one space behind `,` and `:`. A model that is left free to indent may do so for ever, and
the frame around a call is then known to the character (core.serving.forced).

Invariant: an answer that ends under a grammar made here is a valid instance of its schema; what cannot be kept to is
refused, here or by llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from meshnode.core.serving.calls import ARGUMENTS, CALLS, TAGGED_END, TAGS, Format
from meshnode.core.serving.strictness import refuse_unkept
from meshnode.core.serving.text import Vocabulary
from meshnode.core.serving.thoughts import Thinking
from meshnode.errors import InvalidRequest

_FREE: Final = r"/(.|\n)*/"
_STYLE: Final = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    # Without \u every text has one spelling: "\u00e9" would pass for a key that is not "é", and go without its schema.
    "json_allowed_escapes": 'nrbtf\\"',
    # Where it is strict, no two parts of a oneOf fit at once (strictness), so it is an anyOf.
    "coerce_one_of": True,
}


class Schema(msgspec.Struct, frozen=True):
    """A JSON schema as a client gave it."""

    value: Any
    strict: bool
    """Nothing of it may be left out."""


class Callable(msgspec.Struct, frozen=True):
    """A tool and what its arguments must be."""

    name: str
    arguments: Schema


class Frame(msgspec.Struct, frozen=True):
    """The text around calls: opening (before NAME between ARGUMENTS after), separator, ... closing."""

    before: str
    between: str
    after: str
    opening: str = ""
    separator: str = ""
    """Empty: one call only."""
    closing: str = ""


def frame_of(known: Format, template: str) -> Frame:
    """How a call is written that the grammar demands, near to what the model was taught."""
    begin = known.value
    match known:
        case Format.TAGGED:
            return Frame(begin + '\n{"name": "', '", "arguments": ', "}\n" + TAGGED_END, separator="\n")
        case Format.LISTED if ARGUMENTS in template:
            return Frame(begin, ARGUMENTS, "", separator=" ")
        case Format.LISTED:
            return Frame('{"name": "', '", "arguments": ', "}", begin + "[", ", ", "]")
        case Format.BARE:
            key = "parameters" if '"parameters"' in template else "arguments"
            return Frame('{"name": "', f'", "{key}": ', "}")


class Wording:
    """Writes grammars for one vocabulary: control tokens are no text and are named by their ids.

    `lenient`: what llguidance does not know in a schema that is not strict is left out.
    """

    def __init__(self, vocabulary: Vocabulary, thinking: Thinking | None, *, lenient: bool = False) -> None:
        self._lenient = lenient
        tags = TAGS | (thinking.tags if thinking is not None else frozenset())
        self._controls = {text.decode(): token for token, text in vocabulary.markers.items() if text in tags}
        self._thinking = thinking

    def answer(self, schema: Schema) -> str:
        """A JSON value that `schema` describes."""
        return self._whole(f"answer\nanswer: {self._json(schema)}")

    def forced(self, frame: Frame, tools: Sequence[Callable], *, several: bool) -> str:
        """Nothing but calls: one, or with `several` one or more."""
        return self._whole("calls\n" + self._calls(frame, tools, several))

    def offered(self, frame: Frame, tools: Sequence[Callable], *, several: bool, schema: Schema | None = None) -> str:
        """Text (or, with `schema`, JSON), or calls whose arguments keep to their schemas."""
        begin = self._control_in(frame.opening or frame.before)
        rules = self._calls(frame, tools, several)
        if schema is not None:
            if not begin and not frame.separator:
                raise InvalidRequest(
                    "this model writes calls as bare JSON, so an answer of a schema cannot be told from one;"
                    " leave out the tools, or force a call by tool_choice"
                )
            return self._whole(f"answer | calls\nanswer: {self._json(schema)}\n{rules}")
        if begin:
            return self._whole(f"{_FREE} calls?\n{rules}")
        if frame.separator:
            # A lazy lexeme: as soon as the tag stands there, a call has begun. It takes the tag in.
            tag, more = (frame.before.partition("\n")[0], "*" if several else "?")
            inner = msgspec.structs.replace(frame, before=frame.before.removeprefix(tag), separator="")
            rules = self._calls(inner, tools, several=False)
            return self._whole(f"(head calls){more} {_FREE}\nhead[lazy]: /(.|\\n)*{_escaped(tag)}/\n{rules}")
        # Text begins with no brace; nor as a thought does, or a call could follow that as text.
        begins = r"{\s" + ("" if self._thinking is None else _escaped(self._thinking.begin[0]))
        return self._whole(f"(/\\s*[^{begins}](.|\\n)*/)? | calls\n{rules}")

    def _whole(self, body: str) -> str:
        """`body`: what `start` is, and further rules. A thought that the prompt began comes to its end first; one that
        the model begins itself, by its tag, may come before."""
        if self._thinking is None:
            return f"start: {body}"
        end, begun = self._thinking.end, self._thinking.begun
        free = f"{_FREE} {self._literal(end)}"
        rules = [f"body: {body}"]
        if end not in self._controls:
            free = "thought"
            rules.append(f"thought[lazy]: /(.|\\n)*{_escaped(end)}/")
        lead = f"{free} /[ \\n]{{0,2}}/"
        if not begun:
            lead = f"({self._literal(self._thinking.begin)} {lead})?"
        return "\n".join([f"start: {lead} body", *rules])

    def _calls(self, frame: Frame, tools: Sequence[Callable], several: bool) -> str:
        names = " | ".join(f"call{number}" for number in range(len(tools)))
        more = f"({self._literal(frame.separator)} call){{0,{CALLS - 1}}}" if several and frame.separator else ""
        parts = [self._literal(frame.opening), "call", more, self._literal(frame.closing)]
        rules = [
            f"calls: {' '.join(filter(None, parts))}",
            f"call: {self._literal(frame.before)} ({names}) {self._literal(frame.after)}",
        ]
        for number, tool in enumerate(tools):
            between = self._literal(tool.name + frame.between)
            rules.append(f"call{number}: {between} {self._json(_arguments(tool))}")
        return "\n".join(rules)

    def _json(self, schema: Schema) -> str:
        value, lenient = ({} if schema.value is True else schema.value), self._lenient and not schema.strict
        if not isinstance(value, dict):
            raise InvalidRequest("a schema is a JSON object")
        try:
            if not lenient:
                refuse_unkept(value)
            return "%json " + json.dumps({**value, "x-guidance": {**_STYLE, "lenient": lenient}}, allow_nan=False)
        except (RecursionError, ValueError):
            raise InvalidRequest("the schema is too deep, or holds numbers that JSON has not") from None

    def _literal(self, text: str) -> str:
        """Text, with control tokens in it as such."""
        control = self._control_in(text)
        if not control:
            return json.dumps(text) if text else ""
        before, _, after = text.partition(control)
        parts = (self._literal(before), f"<[{self._controls[control]}]>", self._literal(after))
        return " ".join(filter(None, parts))

    def _control_in(self, text: str) -> str:
        return next((control for control in self._controls if control in text), "")


def _arguments(tool: Callable) -> Schema:
    """Arguments are an object, said or not."""
    given = tool.arguments.value
    if given.get("type", "object") != "object":
        raise InvalidRequest(f"the parameters of {tool.name} are no object", "tools")
    return Schema({**given, "type": "object"}, tool.arguments.strict)


def _escaped(text: str) -> str:
    """As a regular expression between slashes."""
    return "".join(f"\\{each}" if not (each.isalnum() or each in "_<>") else each for each in text)
