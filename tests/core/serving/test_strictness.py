"""What llguidance would take and not keep to. What it keeps to is tested with it, in tests/io/llama/test_grammar.py."""

import json
import sys

import pytest

from meshnode.core.serving.strictness import refuse_unkept
from meshnode.errors import InvalidRequest

KINDS = {
    kind: {"type": "object", "properties": {"kind": {"const": kind}, "size": {}}, "required": ["kind", "size"]}
    for kind in ("cat", "dog")
}
UNKEPT = [
    {"type": "object", "minProperties": 2},
    {"type": "object", "properties": {"deep": {"items": {"minProperties": 3, "required": ["a", "b"]}}}},
    {"oneOf": [KINDS["cat"], KINDS["cat"]]},
    {"oneOf": [KINDS["cat"], {**KINDS["dog"], "required": ["size"]}]},
    {"oneOf": [KINDS["cat"], {"$ref": "https://example.org/dog"}]},
    {"oneOf": [KINDS["cat"], True]},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    {"oneOf": [{"const": 5}, {"type": "number", "minimum": 3}]},
    {"oneOf": [{"$ref": "#/$defs/n"}, {"type": "number"}], "$defs": {"n": {"type": "integer"}}},
    {"oneOf": [{"$ref": "#/$defs/n"}, {"type": "null"}], "$defs": {"n": {"$ref": "#/$defs/n"}}},
    {
        "oneOf": [
            {"type": "object", "properties": {"k": {"type": "integer"}}, "required": ["k"]},
            {"type": "object", "properties": {"k": {"type": "number"}}, "required": ["k"]},
        ]
    },
    {"const": "a\0b"},
    {"enum": [{"a": ["\x7f"]}]},
    {"type": "object", "properties": {"a\x1f": {}}},
    {"type": "object", "required": ["\x01"]},
    {"type": "string", "pattern": "^a\\x00b$"},
    {"type": "string", "pattern": "\\u0007"},
    {"type": "object", "patternProperties": {"\x0b": {}}},
    {"const": 2**53 + 1},
    {"enum": [[-(2**64)]]},
    {"type": "integer", "minimum": 2**53 + 1},
    {"const": 123456789.12345679},
    {"type": "number", "maximum": 1e300},
]
KEPT = [
    {},
    {"minProperties": 1},
    {"minProperties": 2, "required": ["a", "b"]},
    {"oneOf": [{"type": ["integer", "null"]}, {"type": "string"}, {"const": True}, {"enum": [[1], {}]}]},
    {"oneOf": [KINDS["cat"], KINDS["dog"], {"type": "array"}]},
    {
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/other"}],
        "$defs": {**KINDS, "other": {"$ref": "#/$defs/dog"}},
    },
    {"const": "\n\t\b\f\r é 😀"},
    {"pattern": r"^\\w+\\n\\.x\\d$", "enum": ["a"]},
    {"const": 2**53},
    {"enum": [0.1, -1e-7, 1e15, 123456789.1234]},
    {"type": "number", "minimum": -2.5, "multipleOf": 0.01},
    {"properties": {"pattern": {"type": "string"}, "const": {"oneOf": [{"type": "null"}, {"type": "string"}]}}},
]


@pytest.mark.parametrize("schema", UNKEPT, ids=json.dumps)
def test_what_would_not_be_kept_to_is_refused_wherever_it_stands(schema):
    for whole in (schema, {"type": "array", "items": schema, "$defs": schema.get("$defs", {})}):
        with pytest.raises(InvalidRequest):
            refuse_unkept(whole)


@pytest.mark.parametrize("schema", KEPT, ids=json.dumps)
def test_what_is_kept_to_is_not_refused(schema):
    refuse_unkept(schema)


def _tagged(parts):
    return [{"type": "object", "properties": {"k": {"const": f"a{n}"}}, "required": ["k"]} for n in range(parts)]


def test_a_oneof_has_so_many_parts_that_each_can_be_held_against_each():
    refuse_unkept({"oneOf": _tagged(64)})
    with pytest.raises(InvalidRequest, match="at most 64 parts"):
        refuse_unkept({"oneOf": _tagged(65)})


def test_the_work_on_a_hostile_schema_grows_with_its_size_and_not_with_its_depth():
    def looks(levels):
        schema = {"minimum": 1}
        for _ in range(levels):
            schema = {"const": {"properties": {"pattern": schema}}}
        counted = 0

        def count(_frame, event, _argument):
            nonlocal counted
            counted += event == "call"

        sys.setprofile(count)
        try:
            refuse_unkept(schema)
        finally:
            sys.setprofile(None)
        return counted

    assert looks(300) < 12 * looks(30)


def test_a_number_deep_within_what_is_written_exactly_is_still_found():
    schema = {"minimum": 2**53 + 1}
    for _ in range(300):
        schema = {"const": {"properties": schema}}
    with pytest.raises(InvalidRequest, match="numbers beyond"):
        refuse_unkept(schema)
