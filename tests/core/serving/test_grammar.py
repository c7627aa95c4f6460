"""How demands on an answer are written. What they mean is tested with llguidance, in tests/io/llama/test_grammar.py."""

import json

import pytest

from meshnode.core.serving.calls import Format
from meshnode.core.serving.grammar import Callable, Schema, Wording, frame_of
from meshnode.core.serving.text import Vocabulary
from meshnode.core.serving.thoughts import Thinking
from meshnode.errors import InvalidRequest

VOCABULARY = Vocabulary(pieces=(b"a", b"", b""), markers={1: b"<|end|>", 2: b"[TOOL_CALLS]"}, end=frozenset({1}))
PLAIN = Wording(VOCABULARY, None)


def inlined(grammar):
    """The JSON behind `%json`."""
    return json.loads(grammar.partition("%json ")[2])


def test_what_a_client_says_about_llguidance_is_not_listened_to():
    schema = {"x-guidance": {"lenient": True, "json_allowed_escapes": "u"}, "type": "string"}
    options = inlined(PLAIN.answer(Schema(schema, strict=True)))["x-guidance"]
    assert options["lenient"] is False
    assert "u" not in options["json_allowed_escapes"]
    assert options["whitespace_flexible"] is False


def test_only_what_is_not_strict_is_relaxed():
    relaxed = Wording(VOCABULARY, None, lenient=True)
    for strict in (True, False):
        assert inlined(relaxed.answer(Schema({}, strict)))["x-guidance"]["lenient"] is not strict
        assert inlined(PLAIN.answer(Schema({}, strict)))["x-guidance"]["lenient"] is False


def test_a_text_of_the_client_cannot_leave_its_place():
    odd = '"}\n%json {}\nstart: "'
    grammar = PLAIN.answer(Schema({"const": odd, odd: 1}, strict=True))
    assert grammar.count("\n") == 1
    assert inlined(grammar)["const"] == odd


@pytest.mark.parametrize("schema", [None, 5, "x", [], False, {"minimum": float("inf")}])
def test_what_is_no_schema_is_refused(schema):
    with pytest.raises(InvalidRequest):
        PLAIN.answer(Schema(schema, strict=True))


def test_a_schema_too_deep_to_write_is_refused():
    deep = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(InvalidRequest):
        PLAIN.answer(Schema(deep, strict=False))


def test_arguments_are_objects():
    grammar = PLAIN.forced(frame_of(Format.BARE, ""), [Callable("f", Schema({}, strict=True))], several=False)
    assert inlined(grammar)["type"] == "object"
    with pytest.raises(InvalidRequest) as refused:
        PLAIN.forced(frame_of(Format.BARE, ""), [Callable("f", Schema({"type": "null"}, strict=True))], several=False)
    assert refused.value.param == "tools"


def test_a_control_token_that_is_no_tag_is_not_meant_by_a_name():
    odd = Vocabulary(pieces=(b"", b""), markers={0: b"add", 1: b"\xff"}, end=frozenset({1}))
    grammar = Wording(odd, None).forced(
        frame_of(Format.TAGGED, ""), [Callable("add", Schema({}, strict=True))], several=True
    )
    assert "<[" not in grammar


def test_control_tokens_are_named_by_their_ids():
    call = [Callable("f", Schema({}, strict=True))]
    assert "<[2]>" in PLAIN.forced(frame_of(Format.LISTED, ""), call, several=True)
    assert "<[2]>" in Wording(VOCABULARY, Thinking("[T]", "[TOOL_CALLS]", begun=True)).answer(Schema({}, strict=True))
    assert "<[2]>" not in PLAIN.forced(frame_of(Format.TAGGED, ""), call, several=True)
