"""Types to schema: what of a msgspec type another implementation must know to speak with ours.

A type is written as one word: `int`, `int(1..65535)`, `str`, `bytes(16)`, `list<T>`, `tuple<T,U>`, `map<K,V>`,
`T|null`, or the name of a message or record of the same file. A type that is not listed here raises: somebody
has to decide.
"""

from __future__ import annotations

import msgspec
from msgspec import inspect

from tools.contract.jsonform import Json, to_json
from tools.contract.protocols import Protocol


def schema(protocol: Protocol) -> Json:
    """The contract of one protocol, as it stands in proto/schema."""
    found: dict[type, Json] = {}
    for each in protocol.messages:
        _record(inspect.type_info(each), found)
    entries = {kind: found.pop(kind) for kind in protocol.messages}
    messages = {message_name(kind): entry for kind, entry in entries.items()}
    assert len(messages) == len(entries), "two messages of one name"
    for kind, entry in [*entries.items(), *found.items()]:
        if kind.__name__ in protocol.canonical:
            entry["canonical"] = True
    return {
        "protocol": protocol.name,
        "carried": protocol.carried,
        "constants": protocol.constants,
        "tables": {table.__name__: {item.name: item.value for item in table} for table in protocol.tables},
        "layouts": {name: list(rows) for name, rows in protocol.layouts.items()},
        "messages": messages,
        "records": {message_name(kind): found[kind] for kind in sorted(found, key=message_name)},
    }


def message_name(kind: type) -> str:
    """The op on the wire; the type's name for what is not told apart by one."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    return str(info.tag) if info.tag is not None else kind.__name__


def _record(info: inspect.Type, found: dict[type, Json]) -> None:
    assert isinstance(info, inspect.StructType)
    if info.cls in found:
        return
    assert not info.forbid_unknown_fields, f"{info.cls.__name__} could not grow"
    entry: Json = {"form": "list" if info.array_like else "map"}
    if info.tag is not None:
        entry["told_by"] = 0 if info.array_like else info.tag_field
        entry["tag"] = info.tag
    found[info.cls] = entry
    entry["fields"] = {each.encode_name: _field(each, found) for each in info.fields}


def _field(each: inspect.Field, found: dict[type, Json]) -> Json:
    entry: Json = {"type": word(each.type, found), "required": each.required}
    if not each.required:
        default = each.default if each.default is not msgspec.NODEFAULT else each.default_factory()
        entry["default"] = to_json(msgspec.to_builtins(default, builtin_types=(bytes,)))
    return entry


def word(info: inspect.Type, found: dict[type, Json]) -> str:
    """`info` as one word; records met on the way are added to `found`."""
    match info:
        case inspect.StructType():
            _record(info, found)
            return message_name(info.cls)
        case inspect.UnionType():
            return "|".join(word(each, found) for each in info.types)
        case inspect.ListType() | inspect.VarTupleType() | inspect.SetType() | inspect.FrozenSetType():
            return f"list<{word(info.item_type, found)}>{_range(info.min_length, info.max_length)}"
        case inspect.TupleType():
            return f"tuple<{','.join(word(each, found) for each in info.item_types)}>"
        case inspect.DictType():
            return f"map<{word(info.key_type, found)},{word(info.value_type, found)}>"
        case inspect.EnumType():
            return f"enum<{','.join(str(each.value) for each in info.cls)}>"
        case _:
            return _scalar(info)


def _scalar(info: inspect.Type) -> str:
    match info:
        case inspect.IntType(ge=low, le=high, gt=None, lt=None):
            return f"int{_range(low, high)}"
        case inspect.BytesType(min_length=low, max_length=high):
            return f"bytes{_range(low, high)}"
        case inspect.StrType(min_length=low, max_length=high, pattern=pattern):
            return f"str{_range(low, high)}{f'/{pattern}/' if pattern else ''}"
        case inspect.FloatType():
            return "float"
        case inspect.BoolType():
            return "bool"
        case inspect.NoneType():
            return "null"
        case _:
            raise TypeError(f"{info} has no word in the schema yet")


def _range(low: int | None, high: int | None) -> str:
    if low is None and high is None:
        return ""
    return f"({low})" if low == high else f"({'' if low is None else low}..{'' if high is None else high})"
