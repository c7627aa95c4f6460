"""How long the way to a member is and how wide, over a BULK stream of its own: for `meshnode ping` and for the planner.

Invariant: bounded in bytes and in time, whatever the peer does.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import trio

from meshnode.app.admin import PingAnswer
from meshnode.core.membership.announcement import Way
from meshnode.core.node.mediator import Mediator
from meshnode.errors import ConfigError, Unavailable
from meshnode.identity.ids import NodeId
from meshnode.io.artifacts import BulkClient
from meshnode.io.transport.transport import Transport
from meshnode.wire.artifacts import CHUNK_BYTES, SAMPLE_BYTES_MAX
from meshnode.wire.preface import StreamClass

ROUNDS = 10
"""Round trips: their median forgives a few that met a busy moment."""
ANSWER_S = 8.0
"""For everything; the command line waits 10 s."""
MEASURE_S = 2.0
"""Of transfer: long enough for TCP to find its speed; between two machines at home this is all of the bytes."""
WAY_S = 0.3
"""The same where nobody asked: a tenth of the bytes is enough for two figures."""
OWN_ROUNDS = 30
"""Of this node to itself, once: what both programs need of a round trip."""


class Probing:
    """Measures the ways from this node. `now` is a monotonic clock in seconds."""

    def __init__(self, mediator: Mediator, transport: Transport, now: Callable[[], float]) -> None:
        self._mediator = mediator
        self._transport = transport
        self._now = now
        self._own_s: float | None = None

    async def ping(self, node: NodeId) -> PingAnswer:
        """The way to `node`. ConfigError for nobody, Unavailable when it is too slow, PeerError, LinkLost."""
        addresses = self._mediator.addresses_of(node)
        if node == self._mediator.node or not addresses:
            raise ConfigError("that is no other member of this mesh", "`meshnode peers` lists them")
        if self._mediator.me.role != "member":
            raise ConfigError("a client measures no ways", "Ping from a member.")
        with trio.move_on_after(ANSWER_S):
            stream = await self._transport.dial(node, addresses, StreamClass.BULK)
            try:
                client = BulkClient(stream, self._mediator.name_of(node))
                trips = [await self._trip(client) for _ in range(ROUNDS)]
                count, seconds = await self._flow(client, MEASURE_S)
            finally:
                await stream.aclose()
            return PingAnswer(
                node=node,
                name=self._mediator.name_of(node),
                path="direct",
                address=stream.remote,
                rtt_ms=tuple(round(trip * 1000, 3) for trip in trips),
                rtt_median_ms=round(median(trips) * 1000, 3),
                transfer_bytes=count,
                bytes_per_s=round(count / seconds),
            )
        raise Unavailable(f"{self._mediator.name_of(node)} did not answer within {ANSWER_S:g} s")

    async def way(self, node: NodeId) -> Way:
        """From `node` to here, without what the programs at both ends need. Unavailable, PeerError, LinkLost."""
        if self._own_s is None:
            self._own_s = await self._own_trip()
        with trio.move_on_after(ANSWER_S):
            stream = await self._transport.dial(node, self._mediator.addresses_of(node), StreamClass.BULK)
            try:
                client = BulkClient(stream, self._mediator.name_of(node))
                trip = min([await self._trip(client) for _ in range(ROUNDS)])
                count, seconds = await self._flow(client, WAY_S)
            finally:
                await stream.aclose()
            # 0 would say that nothing is known.
            return Way(max(1, round((trip - self._own_s) * 1e6)), round(count / seconds))
        raise Unavailable(f"{self._mediator.name_of(node)} did not answer within {ANSWER_S:g} s")

    async def _own_trip(self) -> float:
        """Both ends of a round trip in this one program: as much as this end and one like it take."""
        with trio.move_on_after(ANSWER_S):
            stream = await self._transport.dial(self._mediator.node, self._mediator.me.addresses, StreamClass.BULK)
            try:
                client = BulkClient(stream, self._mediator.me.name)
                return min([await self._trip(client) for _ in range(OWN_ROUNDS)])
            finally:
                await stream.aclose()
        return 0.0

    async def _trip(self, client: BulkClient) -> float:
        begun = self._now()
        await client.sample(1)
        return self._now() - begun

    async def _flow(self, client: BulkClient, longest_s: float) -> tuple[int, float]:
        """Bytes received and the seconds they took; stops after `longest_s`."""
        begun, count = self._now(), 0
        while count < SAMPLE_BYTES_MAX and self._now() - begun < longest_s:
            # Growing pieces: a slow way is measured with few bytes, a fast one is not held up by round trips.
            size = min(max(CHUNK_BYTES // 4, count), SAMPLE_BYTES_MAX - count)
            await client.sample(size)
            count += size
        return count, max(self._now() - begun, 1e-6)
