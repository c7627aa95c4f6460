"""Every message as an older node sends it, without optional fields, and as a newer one does, with fields of its own."""

from __future__ import annotations

import msgpack
import pytest
from msgspec import inspect

from tests.proto.codecs import KINDS, read
from tests.proto.neighbours import newer, older
from tests.proto.test_vectors import VECTORS, unpacked
from tools.contract.jsonform import from_json
from tools.contract.protocols import protocols

CANONICAL = {name for protocol in protocols() for name in protocol.canonical}
GROWING = [(protocol, vector) for protocol, vector in VECTORS if vector["message"] not in CANONICAL]

growing = pytest.mark.parametrize(
    ("protocol", "vector"), GROWING, ids=[f"{protocol}/{vector['name']}" for protocol, vector in GROWING]
)


@growing
def test_fields_that_an_older_node_does_not_send_take_their_defaults(protocol: str, vector: dict) -> None:
    kind = KINDS[protocol, vector["message"]]
    sent = older(from_json(vector["decoded"]), inspect.type_info(kind))
    message = read(protocol, vector["message"], msgpack.packb(sent))
    assert type(message) is kind
    for each in inspect.type_info(kind).fields:
        if not each.required:
            default = each.default_factory() if callable(each.default_factory) else each.default
            assert getattr(message, each.name) == default


@growing
def test_fields_that_a_newer_node_adds_are_ignored(protocol: str, vector: dict) -> None:
    kind = KINDS[protocol, vector["message"]]
    data = bytes.fromhex(vector["hex"])
    sent = msgpack.packb(newer(unpacked(data), inspect.type_info(kind)))
    assert len(sent) > len(data)
    assert read(protocol, vector["message"], sent) == read(protocol, vector["message"], data)
