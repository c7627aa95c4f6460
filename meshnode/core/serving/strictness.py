"""What llguidance takes of a JSON schema and does not keep to: refused, because nothing strict may be let through.

Each rule was found by an instance that it had let through (docs/decisions/0023). A schema is a client's and hostile,
and this runs beside everything else that a node does: no value is looked at more often than its place demands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from itertools import combinations, starmap
from typing import Any, Final

from meshnode.errors import InvalidRequest

_UNWRITTEN: Final = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""What JSON has no letter for: dropped from what must be written exactly."""
_MEANT: Final = re.compile(_UNWRITTEN.pattern + r"|\\(?:[xu]\{|x[017]|u00[017]|[c0ave])")
"""The same in a pattern, as itself or by an escape."""
_BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_EXACT: Final = ("const", "enum", "required")
_REFERENCES: Final = 16
"""Followed one after the other: what refers further, or in a circle, is not looked into."""
_PARTS: Final = 64
"""Of a oneOf, each of which is held against each other one. So many are told apart in 1 ms, and 64 KiB of such in 10;
3,000 in one took 20 s. Tagged unions of real programs have below 20."""

_Part = tuple[frozenset[str], dict[str, frozenset[str]]]
"""Of a oneOf: its types, and its required texts."""


def refuse_unkept(schema: dict[str, Any]) -> None:
    """InvalidRequest for a schema under which an answer might be no instance. Takes time in proportion to its size."""
    parts: dict[int, _Part] = {}
    for each, written in _objects(schema):
        _refuse_keywords(each, written)
        branches = each.get("oneOf")
        if not isinstance(branches, list):
            continue
        if len(branches) > _PARTS:
            raise InvalidRequest(f"a oneOf has at most {_PARTS} parts")
        if not all(starmap(_apart, combinations([_part(branch, schema, parts) for branch in branches], 2))):
            raise InvalidRequest("no two parts of a oneOf may fit at once: these differ neither by type nor by a text")


def _part(branch: Any, root: dict[str, Any], known: dict[int, _Part]) -> _Part:
    """`known`: by identity, because a thousand short references may lead to one long definition."""
    resolved = _resolved(branch, root)
    if id(resolved) not in known:
        part = (_types(resolved), _marks(resolved, root))
        if not resolved:
            return part  # perhaps nothing that lives as long as the schema does
        known[id(resolved)] = part
    return known[id(resolved)]


def _apart(one: _Part, other: _Part) -> bool:
    """Whether no value fits both: by type, where an integer is a number too (llguidance takes them for two), or by a
    required text that differs."""
    (types, names), (others, others_names) = one, other
    if types and others and types.isdisjoint(others):
        return True
    return any(names[name].isdisjoint(others_names[name]) for name in names.keys() & others_names.keys())


def _resolved(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    """Behind references within the schema; {} for what cannot be followed."""
    for _ in range(_REFERENCES):
        if not isinstance(schema, dict) or "$ref" not in schema:
            break
        reference, schema = schema["$ref"], root
        for part in reference.split("/")[1:] if isinstance(reference, str) and reference.startswith("#") else ("",):
            schema = schema.get(part, {}) if isinstance(schema, dict) else {}
    return schema if isinstance(schema, dict) and "$ref" not in schema else {}


def _types(schema: dict[str, Any]) -> frozenset[str]:
    """None of them: any, or not known."""
    if (exact := _exact(schema)) is not None:
        return frozenset(map(_type_of, exact))
    given = schema.get("type")
    given = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    return frozenset("number" if each == "integer" else str(each) for each in given)


def _marks(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, frozenset[str]]:
    """Required properties that are one of some texts, where the schema is of objects only."""
    properties, required = schema.get("properties"), schema.get("required")
    if schema.get("type") != "object" or not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    found = {str(name): _exact(_resolved(properties.get(str(name)), root)) for name in required}
    return {
        name: frozenset(exact)
        for name, exact in found.items()
        if exact is not None and all(isinstance(each, str) for each in exact)
    }


def _exact(schema: dict[str, Any]) -> list[Any] | None:
    """All values that fit, where they are listed."""
    if "const" in schema:
        return [schema["const"]]
    listed = schema.get("enum")
    return listed if isinstance(listed, list) else None


def _type_of(value: Any) -> str:
    names = {bool: "boolean", str: "string", list: "array", dict: "object", type(None): "null"}
    return names.get(type(value), "number")


def _refuse_keywords(schema: dict[str, Any], written: bool) -> None:
    least, required = schema.get("minProperties"), schema.get("required")
    counted = len(set(map(str, required))) if isinstance(required, list) else 0
    if isinstance(least, int) and least > max(counted, 1):
        raise InvalidRequest("minProperties beyond what is required counts a key twice that comes twice")
    patterns = schema.get("patternProperties")
    regular = [schema.get("pattern"), *(patterns if isinstance(patterns, dict) else ())]
    refused = any(_MEANT.search(each) for each in regular if isinstance(each, str))
    # What stands in a const was looked at with it, to the last text and number.
    exact = [] if written else [schema.get(name) for name in _EXACT]
    bounds = [] if written else [schema.get(name) for name in _BOUNDS]
    names = schema.get("properties")
    exact += [list(names) if isinstance(names, dict) else None]
    if refused or not all(_is_written(each) for each in _values(exact)):
        raise InvalidRequest("control characters cannot be written, but for those that JSON has a letter for")
    bounds = [each for each in bounds if isinstance(each, int | float)]
    if not all(_is_kept(each) for each in _values([*exact, *bounds]) if isinstance(each, int | float)):
        raise InvalidRequest("numbers beyond 2**53, and fractions of more than 15 digits, are not kept to the digit")


def _is_written(value: Any) -> bool:
    """Whether a text, or all names of an object, can be written."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, dict) else ()
    return not any(map(_UNWRITTEN.search, texts))


def _values(value: Any) -> Iterator[Any]:
    """It and all within it."""
    left = [value]
    while left:
        value = left.pop()
        yield value
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _is_kept(number: float) -> bool:
    """llguidance's reader of JSON is exact for what a product of two exact doubles gives, and may be beside it else."""
    if isinstance(number, int) or abs(number) > 2**53:
        return abs(number) <= 2**53
    _, digits, exponent = Decimal(repr(number)).normalize().as_tuple()
    return isinstance(exponent, int) and len(digits) <= 15 and abs(exponent) <= 22


def _objects(value: Any) -> Iterator[tuple[dict[str, Any], bool]]:
    """All objects in it, and of each whether it stands within what must be written exactly. Not by recursion, which
    costs a frame a level for each of them."""
    left = [(value, False)]
    while left:
        value, written = left.pop()
        if isinstance(value, dict):
            yield value, written
            left += [(each, written or name in _EXACT) for name, each in value.items()]
        elif isinstance(value, list):
            left += [(each, written) for each in value]
