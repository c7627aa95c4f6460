"""Frames and raw bytes over real TLS, and how streams end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from meshnode.errors import LinkLost, PeerError
from meshnode.io.transport.stream import FramedStream, MeteredStream
from meshnode.io.transport.tls import member_context
from meshnode.wire import limits
from tests.identity.mesh import TestMesh

LIMIT = limits.CONTROL_FRAME


@asynccontextmanager
async def pair(budget: int = limits.UNAUTHENTICATED_BYTES) -> AsyncIterator[tuple[FramedStream, FramedStream]]:
    """Two ends of one TLS connection over a socket pair, their budgets lifted."""
    mesh = TestMesh()
    left, right = (trio.SocketStream(each) for each in trio.socket.socketpair(trio.socket.AF_UNIX))
    async with left, right:
        ends = [
            trio.SSLStream(MeteredStream(left, budget), member_context(False, mesh.node())),
            trio.SSLStream(MeteredStream(right, budget), member_context(True, mesh.node()), server_side=True),
        ]
        async with trio.open_nursery() as nursery:
            for end in ends:
                nursery.start_soon(end.do_handshake)
        for end in ends:
            end.transport_stream.lift()
        yield FramedStream(ends[0], LIMIT), FramedStream(ends[1], LIMIT)


async def test_raw_bytes_follow_frames_in_any_mixture() -> None:
    body = bytes(range(256)) * 8192  # 2 MiB: many TLS records
    async with pair() as (here, there), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            await here.send_frame(str(len(body)).encode())
            await here.send_bytes(body)
            await here.send_frame(b"end")

        left = int(await there.receive_frame())
        received = [await there.receive_bytes(1000)]
        left -= 1000
        while left:
            received.append(await there.receive_some(min(left, limits.BULK_READ)))
            left -= len(received[-1])
        assert await there.receive_frame() == b"end"
        assert b"".join(received) == body


async def test_a_chunk_of_an_artifact_is_encrypted_in_pieces_between_which_others_get_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    async with pair() as (here, there), trio.open_nursery() as nursery:
        encrypt = here._tls.send_all

        async def watched(data: memoryview) -> None:
            sizes.append(len(data))
            await encrypt(data)

        monkeypatch.setattr(here._tls, "send_all", watched)
        nursery.start_soon(here.send_bytes, bytes(limits.BULK_FRAME + 1))
        assert len(await there.receive_bytes(limits.BULK_FRAME)) == limits.BULK_FRAME
        assert len(await there.receive_bytes(1)) == 1
    assert sizes == [limits.BULK_WRITE] * (limits.BULK_FRAME // limits.BULK_WRITE) + [1]


async def test_frames_of_many_senders_stay_whole() -> None:
    frames = [bytes([number]) * 20_000 for number in range(8)]
    async with pair() as (here, there), trio.open_nursery() as nursery:
        for frame in frames:
            nursery.start_soon(here.send_frame, frame)
        assert sorted([await there.receive_frame() for _ in frames]) == frames


async def test_a_cancelled_receive_loses_nothing() -> None:
    async with pair() as (here, there):
        await here.send_bytes((10).to_bytes(4, "big") + b"first")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.receive_frame)
            await wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
        await here.send_bytes(b"later")
        assert await there.receive_frame() == b"firstlater"


async def test_an_oversized_frame_of_the_peer_is_its_error() -> None:
    async with pair() as (here, there):
        await here.send_bytes((LIMIT + 1).to_bytes(4, "big"))
        with pytest.raises(PeerError, match="at most"):
            await there.receive_frame()


async def test_a_close_is_a_lost_link_on_both_ends() -> None:
    async with pair() as (here, there):
        await here.aclose()
        with pytest.raises(LinkLost):
            await there.receive_frame()
        with pytest.raises(LinkLost):
            await here.send_frame(b"after close")


async def test_a_broken_connection_is_a_lost_link_for_reader_and_writer() -> None:
    async with pair() as (here, there):
        await trio.aclose_forcefully(here._tls.transport_stream)
        with pytest.raises(LinkLost):
            await there.receive_frame()
        with pytest.raises(LinkLost):
            await there.send_bytes(bytes(4 * limits.MIB))


async def test_garbled_records_end_the_stream() -> None:
    async with pair() as (here, there):
        await here._tls.transport_stream.send_all(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises((LinkLost, PeerError)):
            await there.receive_frame()


async def test_closing_does_not_wait_for_a_peer_that_does_not_read(autojump_clock: MockClock) -> None:
    async with pair() as (here, _):
        with trio.move_on_after(1):
            while True:
                await here.send_frame(bytes(LIMIT))
        await here.aclose()


async def test_too_many_bytes_before_authentication_end_the_connection() -> None:
    left, right = (trio.SocketStream(each) for each in trio.socket.socketpair(trio.socket.AF_UNIX))
    async with left, MeteredStream(right, 100) as metered:
        await left.send_all(bytes(101))
        await metered.receive_some(60)
        with pytest.raises(PeerError, match="before authentication"):
            await metered.receive_some(60)


async def test_a_handshake_beyond_the_budget_fails() -> None:
    with pytest.RaisesGroup(PeerError):
        async with pair(budget=100):
            pass
