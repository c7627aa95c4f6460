"""The plain preface before TLS, and HELLO inside TLS that repeats it.

    preface: magic `MESH` | version 1 | kind 1 | class 1 | zero 1 | token 16        24 bytes

The preface is read by whoever accepts, to know what the connection is for; it is not protected, so HELLO
repeats it inside TLS and a difference closes. Nothing behind the preface is read in plain.

Invariant: decoding any bytes ends in a value or `PeerError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated

import msgspec

from meshnode.errors import Barred, PeerError
from meshnode.identity.ids import MeshId, NodeId, is_id

MAGIC = b"MESH"
PREFACE_VERSION = 1
PREFACE_BYTES = 24
TOKEN_BYTES = 16
NO_TOKEN = bytes(TOKEN_BYTES)

PROTOCOL = 1
"""Of the messages inside; a node speaks every version from `PROTOCOL_OLDEST` to this one."""
PROTOCOL_OLDEST = 1


class Kind(IntEnum):
    """What a connection is for."""

    MEMBER = 1
    JOIN = 2
    STAGE = 3
    RELAY = 4


class StreamClass(IntEnum):
    """What a stream carries: decides its frame limit and, later, its path and priority."""

    CONTROL = 1
    ACTIVATION = 2
    BULK = 3
    REQUEST = 4
    ISSUER = 5
    """Who holds the root key makes the other end an issuer."""


@dataclass(frozen=True)
class Preface:
    """`token` names the hop of a STAGE connection and is zero otherwise."""

    kind: Kind
    stream_class: StreamClass
    token: bytes = NO_TOKEN


def encode_preface(preface: Preface) -> bytes:
    """24 bytes."""
    assert len(preface.token) == TOKEN_BYTES, "a token has 16 bytes"
    return MAGIC + bytes([PREFACE_VERSION, preface.kind, preface.stream_class, 0]) + preface.token


def decode_preface(data: bytes) -> Preface:
    """Exactly 24 bytes; `PeerError` for anything that this version does not know."""
    if len(data) != PREFACE_BYTES or data[:4] != MAGIC:
        raise PeerError("not a meshnode connection")
    if data[4] != PREFACE_VERSION or data[7] != 0:
        raise PeerError(f"preface version {data[4]}, this node speaks {PREFACE_VERSION}")
    try:
        preface = Preface(Kind(data[5]), StreamClass(data[6]), data[8:])
    except ValueError:
        raise PeerError("a connection of unknown kind or class") from None
    if (preface.kind is Kind.STAGE) != (preface.stream_class is StreamClass.ACTIVATION):
        raise PeerError("activations belong on stage connections, and nothing else does")
    if preface.kind is not Kind.STAGE and preface.token != NO_TOKEN:
        raise PeerError("only a stage connection carries a token")
    return preface


class Hello(msgspec.Struct, frozen=True, tag="hello", array_like=True, forbid_unknown_fields=False):
    """The first message of each side inside TLS on a MEMBER stream."""

    preface: Annotated[bytes, msgspec.Meta(min_length=PREFACE_BYTES, max_length=PREFACE_BYTES)]
    protocol_oldest: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    protocol: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    mesh_id: str
    node_id: str


class Refused(msgspec.Struct, frozen=True, tag="refused", array_like=True):
    """Sent instead of HELLO: the accepting side's reason, for the log of the other."""

    reason: Annotated[str, msgspec.Meta(max_length=200)]
    barred: bool = False
    """The dialer, or its issuer, was revoked: it need not try again soon."""


_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Hello | Refused] = msgspec.msgpack.Decoder(Hello | Refused)


def hello(preface: Preface, mesh_id: MeshId, node_id: NodeId) -> Hello:
    """This side's HELLO."""
    return Hello(encode_preface(preface), PROTOCOL_OLDEST, PROTOCOL, mesh_id, node_id)


def encode_hello(message: Hello | Refused) -> bytes:
    """MessagePack, to be framed."""
    return _ENCODER.encode(message)


def decode_hello(data: bytes) -> Hello | Refused:
    """One frame; `PeerError` unless well-formed."""
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise PeerError("a malformed HELLO") from None


def check_hello(message: Hello | Refused, ours: Hello, peer: NodeId) -> None:
    """`PeerError` unless HELLO repeats our preface and mesh, names the certificate's node and shares a version.

    `Barred` when the peer says so.
    """
    if isinstance(message, Refused):
        printable = "".join(c if c.isprintable() else "?" for c in message.reason)
        if message.barred:
            raise Barred(f"the peer refused: {printable}", printable)
        raise PeerError(f"the peer refused: {printable}")
    if message.preface != ours.preface:
        raise PeerError("HELLO does not repeat the preface")
    if not is_id(message.mesh_id) or message.mesh_id != ours.mesh_id:
        raise PeerError("the peer belongs to another mesh")
    if message.node_id != peer:
        raise PeerError("HELLO names another node than the certificate")
    if message.protocol < ours.protocol_oldest or message.protocol_oldest > ours.protocol:
        theirs = f"{message.protocol_oldest} to {message.protocol}"
        raise PeerError(f"no common protocol version: the peer speaks {theirs}, this node {ours.protocol}")
