"""A link of a given delay between two ends on this machine: a TCP forwarder that holds every byte back for so long.

Invariant: bytes leave in the order in which they came, each `delay_s` after it came; what waits is bounded.
"""

from __future__ import annotations

import socket
from time import perf_counter
from typing import Final

import trio

from meshnode.core.membership.announcement import Way

WAITING: Final = 1024
"""Pieces on their way: at 64 KiB each more than a gigabit line holds in 100 ms; then the sender waits."""
PIECE: Final = 65_536
_TRIPS: Final = 20
_FLOW_BYTES: Final = 4_000_000


class DelayedLink:
    """Connections through a forwarder in this event loop; its tasks live in `nursery`."""

    def __init__(self, nursery: trio.Nursery, delay_s: float) -> None:
        self._nursery = nursery
        self._delay_s = delay_s

    async def connect(self) -> tuple[socket.socket, socket.socket]:
        """Both ends: the one that dialed, the one that accepted."""
        near, into = loopback()
        out, far = loopback()
        ends = [trio.socket.from_stdlib_socket(end) for end in (into, out)]
        for end in ends:
            end.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)
        self._nursery.start_soon(self._forward, ends[0], ends[1])
        return near, far

    async def measure(self) -> Way:
        """Round trip and bandwidth of a connection, as a node would find them."""
        near, far = [trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in await self.connect()]
        async with trio.open_nursery() as nursery, near, far:
            nursery.start_soon(_echo, far)
            trips = [await _trip(near) for _ in range(_TRIPS)]
            begun = perf_counter()
            nursery.start_soon(near.send_all, bytes(_FLOW_BYTES))
            count = 0
            while count < _FLOW_BYTES:
                count += len(await near.receive_some(PIECE))
            # There and back, so each byte went twice; the first of them needed a round trip.
            seconds = max(perf_counter() - begun - min(trips), 1e-6)
            nursery.cancel_scope.cancel()
        return Way(max(1, round(min(trips) * 1e6)), round(2 * _FLOW_BYTES / seconds))

    async def _forward(self, one: trio.socket.SocketType, other: trio.socket.SocketType) -> None:
        with one, other:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, one, other)
                nursery.start_soon(self._pump, other, one)

    async def _pump(self, source: trio.socket.SocketType, target: trio.socket.SocketType) -> None:
        into, pieces = trio.open_memory_channel[tuple[float, bytes]](WAITING)

        async def forward() -> None:
            async for due, data in pieces:
                await trio.sleep_until(due)
                view = memoryview(data)
                while view:
                    view = view[await target.send(view) :]

        try:
            async with trio.open_nursery() as nursery, into:
                nursery.start_soon(forward)
                while data := await source.recv(PIECE):
                    await into.send((trio.current_time() + self._delay_s, data))
            target.shutdown(trio.socket.SHUT_WR)
        except* OSError:
            pass  # an end is gone


async def _echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def _trip(stream: trio.SocketStream) -> float:
    begun = perf_counter()
    await stream.send_all(b"?")
    await stream.receive_some(1)
    return perf_counter() - begun


def loopback() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection: the one that dialed, the one that accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialed = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    for end in (dialed, accepted):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return dialed, accepted
