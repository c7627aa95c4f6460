"""Nodes of another version, made of bytes: what they would send, and a connection over which they do."""

from __future__ import annotations

from typing import Any

import msgpack
import trio
from msgspec import inspect

from meshnode.identity.credentials import Credentials
from meshnode.io.transport.stream import FramedStream, MeteredStream
from meshnode.io.transport.tls import member_context
from meshnode.wire import limits
from meshnode.wire.preface import PREFACE_BYTES, Kind, Preface, StreamClass, encode_preface

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
            told = _listed(value, info, newer, list(info.fields))
            # An older one's list lacks fields that are known by now; a newer one says them, and then its own.
            since = list(info.fields)[len(told) - (info.tag is not None) :]
            return [*told, *(each.default for each in since), *LATER.values()]
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


class Neighbour:
    """A member that speaks protocol `oldest` to `newest`, written with TLS, lengths and msgpack alone.

    `surplus` is what its version adds to HELLO.
    """

    def __init__(self, credentials: Credentials, oldest: int, newest: int, surplus: tuple[Any, ...] = ()) -> None:
        self.credentials = credentials
        self.node = credentials.node_id
        self.range = (oldest, newest)
        self.surplus = surplus
        self.answer: list[Any] = []
        """What came back for its HELLO, or the HELLO that came to it."""

    async def dial(self, port: int, stream_class: StreamClass = StreamClass.CONTROL) -> FramedStream:
        """A connection to the node at `port`, HELLO exchanged."""
        preface = encode_preface(Preface(Kind.MEMBER, stream_class))
        raw = await trio.open_tcp_stream("127.0.0.1", port)
        await raw.send_all(preface)
        stream = await self._secured(raw, server=False)
        await self._greet(stream, preface)
        self.answer = msgpack.unpackb(await stream.receive_frame())
        return stream

    async def accept(self, listener: trio.SocketListener) -> FramedStream:
        """The next connection that a node makes to `listener`, HELLO exchanged."""
        raw = await listener.accept()
        preface = b""
        while len(preface) < PREFACE_BYTES:
            preface += await raw.receive_some(PREFACE_BYTES - len(preface))
        stream = await self._secured(raw, server=True)
        self.answer = msgpack.unpackb(await stream.receive_frame())
        await self._greet(stream, preface)
        return stream

    async def _secured(self, raw: trio.SocketStream, server: bool) -> FramedStream:
        metered = MeteredStream(raw, limits.MIB)
        tls = trio.SSLStream(metered, member_context(server, self.credentials), server_side=server)
        await tls.do_handshake()
        return FramedStream(tls, limits.CONTROL_FRAME)

    async def _greet(self, stream: FramedStream, preface: bytes) -> None:
        own = ["hello", preface, *self.range, self.credentials.mesh_id, self.node, *self.surplus]
        await stream.send_frame(msgpack.packb(own))
