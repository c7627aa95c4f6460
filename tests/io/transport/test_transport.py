"""Dialing and accepting with real sockets and real TLS."""

from __future__ import annotations

import socket

import pytest
import trio

from meshnode.errors import PeerError
from meshnode.io.transport.stream import Stream
from meshnode.io.transport.transport import Handlers, Transport
from meshnode.wire.preface import StreamClass
from tests.identity.mesh import TestMesh


async def echo(stream: Stream) -> None:
    while True:
        await stream.send_frame(await stream.receive_frame())


async def test_two_members_exchange_frames_and_know_each_other(nursery: trio.Nursery) -> None:
    mesh = TestMesh()
    here, there = mesh.node(), mesh.node()
    seen: list[Stream] = []

    async def member(stream: Stream) -> None:
        seen.append(stream)
        await echo(stream)

    port = await nursery.start(Transport(there).serve, "127.0.0.1", 0, Handlers(member))
    stream = await Transport(here).dial(there.node_id, [f"127.0.0.1:{port}"], StreamClass.CONTROL)
    await stream.send_frame(b"hello")
    assert await stream.receive_frame() == b"hello"
    assert stream.peer.node_id == there.node_id
    assert seen[0].peer.node_id == here.node_id
    assert seen[0].stream_class is StreamClass.CONTROL
    await stream.aclose()


async def test_a_member_of_another_mesh_is_refused(nursery: trio.Nursery) -> None:
    there, stranger = TestMesh().node(), TestMesh().node()
    port = await nursery.start(Transport(there).serve, "127.0.0.1", 0, Handlers(echo))
    with pytest.raises(PeerError):
        await Transport(stranger).dial(there.node_id, [f"127.0.0.1:{port}"], StreamClass.CONTROL)


async def test_a_stage_socket_is_handed_on_right_behind_the_preface(nursery: trio.Nursery) -> None:
    mesh = TestMesh()
    sender, receiver = trio.open_memory_channel[tuple[bytes, socket.socket]](1)

    async def stage(token: bytes, plain: socket.socket) -> None:
        await sender.send((token, plain))

    port = await nursery.start(Transport(mesh.node()).serve, "127.0.0.1", 0, Handlers(echo, stage=stage))
    with await Transport(mesh.node()).dial_stage(f"127.0.0.1:{port}", b"t" * 16) as mine:
        mine.sendall(b"first bytes of TLS")
        token, theirs = await receiver.receive()
        with theirs:
            assert token == b"t" * 16
            assert theirs.getblocking()
            assert theirs.recv(100) == b"first bytes of TLS"
            for end in (mine, theirs):
                assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
