"""Decoded MessagePack as JSON and back: JSON knows neither bytes nor maps whose keys are no text."""

from __future__ import annotations

import json
from typing import Any

Json = dict[str, Any]


def to_json(value: Any) -> Any:
    """`{"$bytes": hex}` for bytes, `{"$map": [[key, value], ...]}` for a map with other keys than text."""
    match value:
        case bytes():
            return {"$bytes": value.hex()}
        case list() | tuple():
            return [to_json(each) for each in value]
        case dict() if all(isinstance(key, str) for key in value):
            return {key: to_json(each) for key, each in value.items()}
        case dict():
            return {"$map": [[to_json(key), to_json(each)] for key, each in value.items()]}
        case _:
            return value


def from_json(value: Any) -> Any:
    """What `to_json` was made of; lists for tuples."""
    match value:
        case {"$bytes": digits}:
            return bytes.fromhex(digits)
        case {"$map": pairs}:
            return {from_json(key): from_json(each) for key, each in pairs}
        case list():
            return [from_json(each) for each in value]
        case dict():
            return {key: from_json(each) for key, each in value.items()}
        case _:
            return value


def text_of(value: Any) -> str:
    """How files of proto/ are written: what fits stays on one line, so that a change is one line of a difference."""
    return _lines(value, 0) + "\n"


_WIDTH = 140


def _lines(value: Any, depth: int) -> str:
    flat = json.dumps(value, ensure_ascii=False)
    short = len(flat) + depth * 2 <= _WIDTH
    if not isinstance(value, dict | list) or not value or (short and depth > 2):
        return flat
    pad = "  " * (depth + 1)
    if isinstance(value, dict):
        rows = [f"{pad}{json.dumps(key, ensure_ascii=False)}: {_lines(each, depth + 1)}" for key, each in value.items()]
        return "{\n" + ",\n".join(rows) + "\n" + "  " * depth + "}"
    return "[\n" + ",\n".join(pad + _lines(each, depth + 1) for each in value) + "\n" + "  " * depth + "]"
