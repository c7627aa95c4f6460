from __future__ import annotations

import msgpack
import msgspec
import pytest

from meshnode.errors import PeerError
from meshnode.identity.ids import mesh_id_of, node_id_of
from meshnode.wire import limits
from meshnode.wire.preface import (
    Hello,
    Kind,
    Preface,
    Refused,
    StreamClass,
    check_hello,
    decode_hello,
    decode_preface,
    encode_hello,
    encode_preface,
    hello,
)
from tests.identity.mutate import mutations

MEMBER = Preface(Kind.MEMBER, StreamClass.CONTROL)
STAGE = Preface(Kind.STAGE, StreamClass.ACTIVATION, bytes(range(16)))
MESH, HERE, THERE = mesh_id_of(b"mesh"), node_id_of(b"here"), node_id_of(b"there")
OURS = hello(MEMBER, MESH, HERE)
THEIRS = hello(MEMBER, MESH, THERE)


def test_the_bytes_of_a_preface_are_fixed() -> None:
    assert encode_preface(MEMBER).hex() == "4d45534801010100" + "00" * 16
    assert encode_preface(STAGE).hex() == "4d45534801030200" + bytes(range(16)).hex()


@pytest.mark.parametrize("preface", [MEMBER, STAGE, Preface(Kind.JOIN, StreamClass.CONTROL)])
def test_a_preface_comes_back(preface: Preface) -> None:
    assert decode_preface(encode_preface(preface)) == preface


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x.",
        encode_preface(MEMBER)[:-1],
        encode_preface(MEMBER) + b"\0",
        b"MESH\x02" + encode_preface(MEMBER)[5:],
        b"MESH\x01\x09\x01\0" + bytes(16),
        b"MESH\x01\x01\x09\0" + bytes(16),
        b"MESH\x01\x01\x01\x01" + bytes(16),
        b"MESH\x01\x01\x01\0" + bytes(15) + b"\x01",
        b"MESH\x01\x01\x02\0" + bytes(16),
        b"MESH\x01\x03\x01\0" + bytes(16),
    ],
)
def test_what_this_version_does_not_know_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        decode_preface(data)


def test_damaged_prefaces_are_prefaces_or_peer_errors() -> None:
    for data in mutations([encode_preface(MEMBER), encode_preface(STAGE)]):
        try:
            assert encode_preface(decode_preface(data)) == data
        except PeerError:
            pass


def test_hello_is_messagepack_that_others_read_and_fits_its_frame() -> None:
    data = encode_hello(OURS)
    assert len(data) <= limits.HELLO_FRAME
    assert msgpack.unpackb(data) == ["hello", encode_preface(MEMBER), 1, 1, MESH, HERE]
    assert decode_hello(data) == OURS


def test_a_fitting_hello_passes() -> None:
    check_hello(THEIRS, OURS, THERE)
    check_hello(msgspec.structs.replace(THEIRS, protocol=7), OURS, THERE)  # newer, and still speaks 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preface": encode_preface(Preface(Kind.MEMBER, StreamClass.BULK))}, "repeat the preface"),
        ({"mesh_id": mesh_id_of(b"other")}, "another mesh"),
        ({"mesh_id": "x"}, "another mesh"),
        ({"node_id": HERE}, "another node"),
        ({"protocol_oldest": 2, "protocol": 3}, "no common protocol version: the peer speaks 2 to 3"),
    ],
)
def test_a_hello_that_differs_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PeerError, match=message):
        check_hello(msgspec.structs.replace(THEIRS, **changes), OURS, THERE)


def test_a_refusal_is_shown_without_control_characters() -> None:
    with pytest.raises(PeerError) as caught:
        check_hello(Refused("go\x1b[31m away\n"), OURS, THERE)
    assert str(caught.value) == "the peer refused: go?[31m away?"


def test_damaged_hellos_end_in_messages_or_peer_errors() -> None:
    for data in mutations([encode_hello(THEIRS), encode_hello(Refused("why"))]):
        try:
            message = decode_hello(data)
            assert isinstance(message, (Hello, Refused))
            check_hello(message, OURS, THERE)
        except PeerError:
            pass
