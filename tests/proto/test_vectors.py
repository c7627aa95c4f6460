"""Golden vectors: read and written by the nodes' own codecs, and by the msgpack package that knows nothing of them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import msgpack
import pytest

from tests.proto.codecs import KINDS, read, write
from tools.contract.jsonform import from_json, to_json
from tools.contract.protocols import protocols
from tools.contract.vectors import whole
from tools.export_schema import PROTO

VECTORS = [
    (protocol.name, vector)
    for protocol in protocols()
    for vector in json.loads((PROTO / "vectors" / f"{protocol.name}.json").read_text(encoding="utf-8"))
]

every_vector = pytest.mark.parametrize(
    ("protocol", "vector"), VECTORS, ids=[f"{protocol}/{vector['name']}" for protocol, vector in VECTORS]
)


def unpacked(data: bytes) -> Any:
    return msgpack.unpackb(data, strict_map_key=False)


def covers(sent: Any, understood: Any) -> bool:
    """Whether `understood` says all that was `sent`, and at most more."""
    match sent, understood:
        case dict(), dict():
            return all(key in understood and covers(value, understood[key]) for key, value in sent.items())
        case list(), list():
            return len(sent) <= len(understood) and all(map(covers, sent, understood))
        case _:
            return bool(sent == understood)


@every_vector
def test_an_independent_reader_and_writer_agrees(protocol: str, vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    assert to_json(unpacked(data)) == vector["decoded"]
    assert msgpack.packb(from_json(vector["decoded"])) == data


@every_vector
def test_our_reader_understands_it_and_our_writer_says_the_same(protocol: str, vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    kind = KINDS[protocol, vector["message"]]
    message = read(protocol, vector["message"], data)
    assert type(message) is kind
    written = write(protocol, message)
    assert covers(unpacked(data), unpacked(written))
    if whole(vector, kind):
        assert written == data


def test_every_message_has_a_vector_with_all_its_fields() -> None:
    found = {
        (protocol, vector["message"])
        for protocol, vector in VECTORS
        if whole(vector, KINDS[protocol, vector["message"]])
    }
    assert found == set(KINDS)


def test_no_two_vectors_share_a_name() -> None:
    assert max(Counter((protocol, vector["name"]) for protocol, vector in VECTORS).values()) == 1


def test_numbers_of_every_width_occur() -> None:
    """MessagePack writes an integer in the shortest of nine ways; a reader that lacks one would pass otherwise."""
    heads = {byte for _, vector in VECTORS for byte in bytes.fromhex(vector["hex"])}
    assert {0xCC, 0xCD, 0xCE, 0xCF, 0xCB, 0xC0, 0xC2, 0xC3, 0xC4} <= heads
