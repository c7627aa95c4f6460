"""What llguidance takes of a JSON schema and does not keep to: refused, because nothing strict may be let through.

Each rule was found by an instance that it had let through (docs/decisions/0023).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from itertools import combinations
from typing import Any, Final

from meshnode.errors import InvalidRequest

_UNWRITTEN: Final = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""What JSON has no letter for: dropped from what must be written exactly."""
_MEANT: Final = re.compile(_UNWRITTEN.pattern + r"|\\(?:[xu]\{|x[017]|u00[017]|[c0ave])")
"""The same in a pattern, as itself or by an escape."""
_BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_REFERENCES: Final = 16
"""Followed one after the other: what refers further, or in a circle, is not looked into."""


def refuse_unkept(schema: dict[str, Any]) -> None:
    """InvalidRequest for a schema under which an answer might be no instance. RecursionError for one too deep."""
    for each in _objects(schema):
        _refuse_keywords(each)
        branches = each.get("oneOf")
        pairs = combinations(branches, 2) if isinstance(branches, list) else ()
        if not all(_apart(one, other, schema) for one, other in pairs):
            raise InvalidRequest("no two parts of a oneOf may fit at once: these differ neither by type nor by a text")


def _apart(one: Any, other: Any, root: dict[str, Any]) -> bool:
    """Whether no value fits both: by type, where an integer is a number too (llguidance takes them for two), or by a
    required text that differs."""
    one, other = _resolved(one, root), _resolved(other, root)
    types, others = _types(one), _types(other)
    if types and others and types.isdisjoint(others):
        return True
    names, others_names = _marks(one, root), _marks(other, root)
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


def _refuse_keywords(schema: dict[str, Any]) -> None:
    least, required = schema.get("minProperties"), schema.get("required")
    counted = len(set(map(str, required))) if isinstance(required, list) else 0
    if isinstance(least, int) and least > max(counted, 1):
        raise InvalidRequest("minProperties beyond what is required counts a key twice that comes twice")
    exact = [schema.get(name) for name in ("const", "enum", "required")]
    names, patterns = schema.get("properties"), schema.get("patternProperties")
    exact += [list(names) if isinstance(names, dict) else None]
    regular = [schema.get("pattern"), *(patterns if isinstance(patterns, dict) else ())]
    if any(map(_UNWRITTEN.search, _texts(exact))) or any(map(_MEANT.search, _texts(regular))):
        raise InvalidRequest("control characters cannot be written, but for those that JSON has a letter for")
    if not all(map(_is_kept, _numbers([*exact, *(schema.get(name) for name in _BOUNDS)]))):
        raise InvalidRequest("numbers beyond 2**53, and fractions of more than 15 digits, are not kept to the digit")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, dict):
        yield from _numbers(list(value.values()))
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(each)


def _is_kept(number: float) -> bool:
    """llguidance's reader of JSON is exact for what a product of two exact doubles gives, and may be beside it else."""
    if isinstance(number, int) or abs(number) > 2**53:
        return abs(number) <= 2**53
    _, digits, exponent = Decimal(repr(number)).normalize().as_tuple()
    return isinstance(exponent, int) and len(digits) <= 15 and abs(exponent) <= 22


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for each in value.values():
            yield from _objects(each)
    elif isinstance(value, list):
        for each in value:
            yield from _objects(each)
