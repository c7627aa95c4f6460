"""What a request demands of the form of its answer, as one grammar that the model it is asked of can keep to.

Invariant: what is demanded strictly is enforced or refused with 400 and the field; only a schema that is not strict may
be relaxed, and the answer says so in a header.
"""

from __future__ import annotations

from collections.abc import Callable as Function
from collections.abc import Sequence
from typing import Final

import msgspec

from meshnode.core.serving.calls import Format
from meshnode.core.serving.grammar import Callable, Schema, Wording, frame_of
from meshnode.core.serving.thoughts import Thinking
from meshnode.errors import InvalidRequest
from meshnode.io.http.backend import ServedModel
from meshnode.io.http.fields import ChatRequest, SamplingFields
from meshnode.io.http.turns import Tool
from meshnode.wire.sampling import GRAMMAR_BYTES


class Demanded(msgspec.Struct, frozen=True):
    """`grammar` is empty where nothing is demanded."""

    grammar: str = ""
    relaxed: bool = False


NOTHING: Final = Demanded()
_TOO_LARGE: Final = f"schemas and grammars of one request have at most {GRAMMAR_BYTES} bytes"


async def completion_grammar(model: ServedModel, asked: SamplingFields) -> Demanded:
    """Of a completion: llama.cpp's two fields."""
    if asked.grammar and asked.json_schema is not None:
        raise InvalidRequest("grammar and json_schema exclude each other", "grammar")
    if asked.grammar:
        return await _translated(model, asked)
    if asked.json_schema is None:
        return NOTHING
    schema, wording = Schema(asked.json_schema, strict=True), Wording(model.vocabulary, None)
    _refuse_large([schema], "json_schema")
    return await _checked(model, asked, "json_schema", [lambda: wording.answer(schema)])


async def chat_grammar(
    model: ServedModel, asked: ChatRequest, known: Format | None, thinking: Thinking | None
) -> Demanded:
    """Of a chat. `known`: how calls are written, None where there are no tools."""
    schema, field = asked.demanded_schema()
    tools = [_callable(tool) for tool in asked.callable_tools()]
    if asked.grammar:
        if tools or field:
            raise InvalidRequest("a grammar excludes tools and every other demand on the form", "grammar")
        return await _translated(model, asked)
    forced = asked.forces_calls()
    if schema is None and not forced and not any(tool.arguments.strict for tool in tools):
        return NOTHING

    def written(wording: Wording) -> str:
        if known is None or not tools:
            assert schema is not None, "nothing else is demanded"
            return wording.answer(schema)
        frame, several = frame_of(known, model.vocabulary.chat_template), asked.parallel_tool_calls is not False
        if forced:
            return wording.forced(frame, tools, several=several and asked.tool_choice == "required")
        return wording.offered(frame, tools, several=several, schema=schema)

    whole, lenient = [Wording(model.vocabulary, thinking, lenient=lenient) for lenient in (False, True)]
    given = [tool.arguments for tool in tools] + ([schema] if schema is not None else [])
    _refuse_large(given, "tools" if forced or not field else field)
    ways = [lambda: written(whole)] + ([] if all(each.strict for each in given) else [lambda: written(lenient)])
    return await _checked(model, asked, "tools" if forced or not field else field, ways)


def _refuse_large(given: Sequence[Schema], field: str) -> None:
    """Before anything looks into them: a body has 32 MiB, and whoever reads schemas takes the time of all requests."""
    try:
        size = sum(len(msgspec.json.encode(schema.value)) for schema in given)
    except RecursionError:
        raise InvalidRequest("the schema is too deep", field) from None
    if size > GRAMMAR_BYTES:
        raise InvalidRequest(_TOO_LARGE, field)


def _callable(tool: Tool) -> Callable:
    return Callable(tool.function.name, Schema(tool.function.parameters or {}, strict=bool(tool.function.strict)))


async def _checked(
    model: ServedModel, asked: SamplingFields, field: str, ways: Sequence[Function[[], str]]
) -> Demanded:
    """The first of the ways that can be kept to; the second one is relaxed."""
    _exclude_endless(asked)
    reason: InvalidRequest | None = None
    for number, written in enumerate(ways):
        try:
            return Demanded(await _check(model, written()), relaxed=number > 0)
        except InvalidRequest as refusal:
            reason = refusal
    assert reason is not None, "there is a first way"
    raise InvalidRequest(f"{field} cannot be enforced: {reason}", reason.param or field)


async def _translated(model: ServedModel, asked: SamplingFields) -> Demanded:
    _exclude_endless(asked)
    try:
        return Demanded(await _check(model, asked.grammar or "", gbnf=True))
    except InvalidRequest as refusal:
        raise InvalidRequest(f"grammar cannot be enforced: {refusal}", "grammar") from None


async def _check(model: ServedModel, grammar: str, *, gbnf: bool = False) -> str:
    """Its size first: what is too large is not even compiled. Translated, it is longer."""
    for _ in range(2):
        if len(grammar.encode("utf-8", "replace")) > GRAMMAR_BYTES:
            raise InvalidRequest(_TOO_LARGE)
        grammar, gbnf = await model.check_grammar(grammar, gbnf=gbnf), False
    return grammar


def _exclude_endless(asked: SamplingFields) -> None:
    if asked.ignore_eos:
        raise InvalidRequest("ignore_eos and an answer of a given form exclude each other", "ignore_eos")
