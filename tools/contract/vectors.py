"""Golden vectors: bytes of every message with their decoded form, and an example of a message that has none yet.

A vector is never rewritten. When a message grows, its old vector stays (this is what older nodes send) and a new one
with every field joins it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import msgspec
from msgspec import inspect

from meshnode.wire.messages import GOSSIP_BUCKETS
from tools.contract.jsonform import Json, to_json
from tools.contract.protocols import Protocol
from tools.contract.schema import message_name

EXAMPLES: dict[str, Any] = {
    "digest": "0123456789abcdef" * 4,
    "manifest_digest": "0123456789abcdef" * 4,
    "plan_digest": "fedcba9876543210" * 4,
    "artifact": "layer.12",
    "reason": "no_room",
    "author": "a" * 52,
    "node": "b" * 51 + "a",
    "node_id": "b" * 51 + "a",
    "coordinator": "c" * 51 + "q",
    "source": "d" * 51 + "a",
    "mesh": "m" * 51 + "q",
    "mesh_id": "m" * 51 + "q",
    "run": "0123456789abcdef",
    "status": 200,
    "preface": bytes.fromhex("4d45534801010100") + bytes(16),
    "protocol": 1,
    "protocol_oldest": 1,
    "nonce": 2**63,
    "seed": 2**64 - 1,
    "term": 300,
    "context": 131_072,
    "memory_usable": 137_438_953_472,
    "remaining_ms": 65_535,
    "keep": 128,
    "top_p": 0.75,
    "min_p": 0.125,
    "typical_p": 0.5,
    "logprob": -0.5,
    "alternatives": [[300, -0.5], [7, -1.25]],
    "lanes": [1, 3],
    "ids": [bytes(range(16)), bytes(range(16, 32))],
    "hashes": [bytes([index]) * 8 for index in range(GOSSIP_BUCKETS)],
    "root": bytes(range(8)),
    "version": 1,
    "layers": 1,
    "artifacts": [
        ["metadata", 8, bytes(range(32)), []],
        ["embedding", 64, bytes(range(1, 33)), [["token_embd.weight", 1, [16, 2], 0, 64]]],
        ["layer.0", 70_000, bytes(range(2, 34)), [["blk.0.ffn_up.weight", 0, [17_500], 0, 70_000]]],
    ],
}
"""By field name, where made-up values would be impossible or mislead, and numbers of every width that MessagePack has.
A field of another type is made up like any other."""


def whole(vector: Json, kind: type) -> bool:
    """Whether today's encoder still writes the very bytes of `vector`: no field joined since it was recorded."""
    data = bytes.fromhex(vector["hex"])
    return msgspec.msgpack.encode(msgspec.msgpack.decode(data, type=kind)) == data


def missing(protocol: Protocol, recorded: list[Json]) -> Iterator[Json]:
    """A vector for each message that has no whole one."""
    for kind in protocol.messages:
        name = message_name(kind)
        own = [vector for vector in recorded if vector["message"] == name]
        if not any(whole(vector, kind) for vector in own):
            data = msgspec.msgpack.encode(msgspec.convert(_example(kind), kind, builtin_types=(bytes,)))
            title = f"{name}, grown {len(own)}" if own else name
            yield {"name": title, "message": name, "hex": data.hex(), "decoded": to_json(msgspec.msgpack.decode(data))}


def _example(kind: type) -> Any:
    return _value(inspect.type_info(kind), "", count(1))


def _value(info: inspect.Type, name: str, numbers: Iterator[int]) -> Any:
    """Something of this type, different from its neighbours so that a swap shows."""
    match info:
        case inspect.StructType(fields=fields):
            values = {each.encode_name: _field(each, numbers) for each in fields}
            if not info.array_like:
                return values if info.tag is None else {info.tag_field: info.tag, **values}
            return ([] if info.tag is None else [info.tag]) + list(values.values())
        case inspect.UnionType(types=types):
            return _value(next(each for each in types if not isinstance(each, inspect.NoneType)), name, numbers)
        case (
            inspect.VarTupleType(item_type=item)
            | inspect.ListType(item_type=item)
            | inspect.FrozenSetType(item_type=item)
        ):
            kinds = item.types if isinstance(item, inspect.UnionType) else (item,)
            return [_value(each, name, numbers) for each in kinds]
        case inspect.TupleType(item_types=items):
            return [_value(each, name, numbers) for each in items]
        case inspect.DictType(key_type=key, value_type=value):
            return {_value(key, name, numbers): _value(value, name, numbers)}
        case _:
            return _scalar(info, name, next(numbers))


def _field(each: inspect.Field, numbers: Iterator[int]) -> Any:
    if _fits(each.type, EXAMPLES.get(each.encode_name)):
        return EXAMPLES[each.encode_name]
    if isinstance(each.type, inspect.BoolType):
        return each.default is not True
    return _value(each.type, each.encode_name, numbers)


def _fits(info: inspect.Type, example: Any) -> bool:
    match info:
        case inspect.UnionType(types=types):
            return any(_fits(each, example) for each in types if not isinstance(each, inspect.NoneType))
        case inspect.IntType():
            return isinstance(example, int)
        case inspect.StrType():
            return isinstance(example, str)
        case inspect.BytesType():
            return isinstance(example, bytes)
        case inspect.FloatType():
            return isinstance(example, float)
        case inspect.VarTupleType():
            return isinstance(example, list)
        case _:
            return False


def _scalar(info: inspect.Type, name: str, number: int) -> Any:
    match info:
        case inspect.IntType(ge=low):
            return max(number, low or 0)
        case inspect.BytesType(min_length=low):
            return bytes((number + index) % 256 for index in range(4 if low is None else low))
        case inspect.StrType():
            return f"{name} {number}"
        case inspect.FloatType():
            return number + 0.5
        case inspect.BoolType():
            return True
        case _:
            raise TypeError(f"no example of {info} yet: {name}")
