"""`meshnode ping`: how long the way to a member is and how wide, over a BULK stream of its own.

Invariant: bounded in bytes and in time, whatever the peer does.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import trio

from meshnode.app.admin import PingAnswer
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


class Probing:
    """Measures the ways from this node. `now` is a monotonic clock in seconds."""

    def __init__(self, mediator: Mediator, transport: Transport, now: Callable[[], float]) -> None:
        self._mediator = mediator
        self._transport = transport
        self._now = now

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
                count, seconds = await self._flow(client)
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

    async def _trip(self, client: BulkClient) -> float:
        begun = self._now()
        await client.sample(1)
        return self._now() - begun

    async def _flow(self, client: BulkClient) -> tuple[int, float]:
        """Bytes received and the seconds they took; stops after MEASURE_S."""
        begun, count = self._now(), 0
        while count < SAMPLE_BYTES_MAX and self._now() - begun < MEASURE_S:
            # Growing pieces: a slow way is measured with few bytes, a fast one is not held up by round trips.
            size = min(max(CHUNK_BYTES // 4, count), SAMPLE_BYTES_MAX - count)
            await client.sample(size)
            count += size
        return count, max(self._now() - begun, 1e-6)
