"""Nodes of another version, made of bytes: what they would send, and a connection over which they do."""

from __future__ import annotations

from typing import Any

from msgspec import inspect

LATER = {"colour": {"deep": [1, None, b"x", 2**40]}, "shade": 0.5}
"""Fields that no version has today."""


def older(value: Any, info: inspect.Type) -> Any:
    """`value` without any field that has a default, at every depth: the least that any older version may send."""
    match info:
        case inspect.StructType(array_like=True):
            return _listed(value, info, older, [each for each in info.fields if each.required])
        case inspect.StructType():
            told = {info.tag_field: value[info.tag_field]} if info.tag_field else {}
            return told | {
                each.encode_name: older(value[each.encode_name], each.type)
                for each in info.fields
                if each.required and each.encode_name in value
            }
        case _:
            return _inside(value, info, older)


def newer(value: Any, info: inspect.Type) -> Any:
    """`value` with unknown fields in every map, in front, and unknown items at the end of every list of fields."""
    match info:
        case inspect.StructType(array_like=True):
            return [*_listed(value, info, newer, list(info.fields)), *LATER.values()]
        case inspect.StructType():
            kinds = {each.encode_name: each.type for each in info.fields}
            known = {key: newer(each, kinds[key]) if key in kinds else each for key, each in value.items()}
            return LATER | known
        case _:
            return _inside(value, info, newer)


def _listed(value: list[Any], info: inspect.StructType, change: Any, fields: list[inspect.Field]) -> list[Any]:
    told = value[:1] if info.tag is not None else []
    return told + [change(item, each.type) for item, each in zip(value[len(told) :], fields, strict=False)]


def _inside(value: Any, info: inspect.Type, change: Any) -> Any:
    match info:
        case inspect.VarTupleType() | inspect.ListType():
            return [change(item, _of(item, info.item_type)) for item in value]
        case inspect.DictType():
            return {key: change(item, info.value_type) for key, item in value.items()}
        case _:
            return value


def _of(value: Any, info: inspect.Type) -> inspect.Type:
    """The member of a union that `value` is, told by its tag."""
    if not isinstance(info, inspect.UnionType) or not isinstance(value, dict):
        return info
    return next(
        each for each in info.types if isinstance(each, inspect.StructType) and each.tag == value[each.tag_field]
    )
