from __future__ import annotations

import socket

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.app.bench.throwaway import ThrowawayMesh
from meshnode.errors import PeerError, StageLost
from meshnode.io.stage.headstream import secure
from meshnode.io.transport.tls import check_stage_peer, stage_context

MESH = ThrowawayMesh.make()


def loopback():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialed = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    return dialed, accepted


async def end(connection, mesh, own, peer, *, server):
    key = Ed25519PrivateKey.generate()
    context = stage_context(server, mesh.chain_for(key.public_key(), own), key, MESH.root_pem)
    return await secure(connection, context, lambda der: check_stage_peer(der, peer), server=server)


async def pair(peer_mesh=MESH, expected=None):
    """The head that dials stage 0, and the stage; each end, or the error that it got."""
    dialed, accepted = loopback()
    ends = {}

    async def make(name, *arguments, **options) -> None:
        try:
            ends[name] = await end(*arguments, **options)
        except (PeerError, StageLost) as error:
            ends[name] = error

    async with trio.open_nursery() as nursery:
        head, stage = MESH.head_name, expected or MESH.stage_name(0)
        nursery.start_soon(lambda: make("head", dialed, MESH, head, stage, server=False))
        nursery.start_soon(lambda: make("stage", accepted, peer_mesh, MESH.stage_name(0), head, server=True))
    return ends["head"], ends["stage"]


async def test_bytes_go_both_ways_and_the_end_is_seen() -> None:
    head, stage = await pair()
    await head.send_all(b"rows")
    assert await stage.receive_some() == b"rows"
    await stage.send_all(memoryview(b"samples"))
    assert await head.receive_some(3) == b"sam"
    assert await head.receive_some() == b"ples"
    await stage.aclose()
    await stage.aclose()
    assert await head.receive_some() == b""
    await head.aclose()


async def test_more_than_the_socket_holds_waits_for_the_reader() -> None:
    head, stage = await pair()
    data = bytes(range(256)) * 40_000
    got = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(head.send_all, data)
        while len(got) < len(data):
            got += await stage.receive_some()
    assert bytes(got) == data
    await head.aclose()
    await stage.aclose()


async def test_a_reader_lets_other_tasks_run_while_there_is_always_something_to_read() -> None:
    head, stage = await pair()
    turns = []

    async def other() -> None:
        for _ in range(3):
            turns.append(len(turns))
            await trio.lowlevel.checkpoint()

    await stage.send_all(b"x" * 1000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(100):
            assert await head.receive_some(1) == b"x"
        assert turns == [0, 1, 2]
    await head.aclose()
    await stage.aclose()


async def test_a_connection_that_breaks_is_stage_lost() -> None:
    head, stage = await pair()
    await stage.aclose()
    with pytest.raises(StageLost):
        await head.send_all(b"x" * 100_000_000)
    await head.aclose()


async def test_a_stage_of_another_mesh_or_with_another_name_is_refused() -> None:
    stranger, _ = await pair(peer_mesh=ThrowawayMesh.make())
    assert isinstance(stranger, PeerError)
    misnamed, other = await pair(expected=MESH.stage_name(1))
    assert isinstance(misnamed, PeerError)
    await other.aclose()


async def test_a_peer_that_leaves_or_talks_nonsense_during_the_handshake_is_an_error() -> None:
    for last_words, error in ((b"", StageLost), (b"GET / HTTP/1.1\r\n\r\n", PeerError)):
        dialed, accepted = loopback()
        accepted.sendall(last_words)
        accepted.shutdown(socket.SHUT_WR)
        with pytest.raises(error):
            await end(dialed, MESH, MESH.head_name, MESH.stage_name(0), server=False)
        accepted.close()


async def test_a_peer_that_says_nothing_is_given_up(autojump_clock) -> None:
    dialed, accepted = loopback()
    with pytest.raises(StageLost):
        await end(dialed, MESH, MESH.head_name, MESH.stage_name(0), server=False)
    accepted.close()
