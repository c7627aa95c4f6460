"""CONTROL links: dial, keep one per peer, move messages between them and the mediator.

Invariant: at most one link per peer is current; of two dialed crosswise the one dialed by the lower node id stays, and
only the current one's end is told to the mediator.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from meshnode.core.node.events import Event, LinkClosed, LinkOpened, Received
from meshnode.errors import Barred, MeshError
from meshnode.identity.ids import NodeId, short
from meshnode.io.transport.stream import Stream
from meshnode.io.transport.transport import Transport
from meshnode.wire.messages import AnyMessage, Unrecognised, decode, encode
from meshnode.wire.preface import StreamClass

log = logging.getLogger("meshnode.links")

OUTGOING = 512
"""Messages waiting for a slow peer: a whole roster of announcements; beyond, the link is closed and redialed."""
SEND_S = 10.0
"""One frame: a peer that takes longer to read 64 KiB is as good as lost."""
LAST_WORD_S = 60.0
"""For the end of a link to be told while the mediator's queue is full: as long as a disk may stall under a write."""
CROSSWISE_S = 2.0
"""For the other end to accept our dial and let go of its own; below the grace of a lost link (links.GRACE_S)."""


class _Link:
    """One authenticated CONTROL stream."""

    def __init__(self, stream: Stream, dialer: NodeId) -> None:
        self.stream = stream
        self.peer = stream.peer.node_id
        self.dialer = dialer
        self.into, self.outgoing = trio.open_memory_channel[AnyMessage](OUTGOING)
        self.scope = trio.CancelScope()
        self.written = trio.Event()
        self.reason = ""

    def close(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.scope.cancel()


class ControlLinks:
    """All CONTROL links of this node. `post` hands an event to the mediator."""

    def __init__(self, transport: Transport, own: NodeId, post: Callable[[Event], Awaitable[None]]) -> None:
        self._transport = transport
        self._own = own
        self._post = post
        self._links: dict[NodeId, _Link] = {}

    def send(self, peer: NodeId, message: AnyMessage) -> None:
        """Queue a message; dropped without a link, and a link that is too slow is closed."""
        link = self._links.get(peer)
        if link is None:
            return
        try:
            link.into.send_nowait(message)
        except trio.WouldBlock:
            link.close("the peer reads too slowly")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the link is ending; what it carried is told anew on the next one

    def close(self, peer: NodeId, reason: str) -> None:
        """End the link to `peer`, if there is one."""
        link = self._links.get(peer)
        if link is not None:
            link.close(reason)

    async def dial(self, node: NodeId, addresses: tuple[str, ...]) -> None:
        """Dial and serve the link until it ends."""
        try:
            stream = await self._transport.dial(node, addresses, StreamClass.CONTROL)
        except MeshError as error:
            if node not in self._links:
                reason = str(error)
                if isinstance(error, Barred):
                    reason = error.reason
                    log.warning("%s lets this node in no more: %s", short(node), reason)
                await self._post(LinkClosed(node, reason, isinstance(error, Barred)))
            return
        try:
            await self._serve(_Link(stream, self._own))
        finally:
            await stream.aclose()

    async def accepted(self, stream: Stream) -> None:
        """Serve a link that a peer dialed, until it ends."""
        await self._serve(_Link(stream, stream.peer.node_id))

    async def drain(self) -> None:
        """Take no more messages; wait until what was queued has been sent, or the links are gone."""
        links = list(self._links.values())
        for link in links:
            link.into.close()
        for link in links:
            await link.written.wait()

    async def _serve(self, link: _Link) -> None:
        present = self._links.get(link.peer)
        if present is not None:
            if present.dialer != link.dialer and present.dialer == min(link.peer, self._own):
                # Closed at once, it would be a lost link over there until our dial has been accepted.
                with trio.move_on_after(CROSSWISE_S):
                    await _ended(link.stream)
                return
            present.close("replaced")
        self._links[link.peer] = link
        try:
            await self._post(LinkOpened(link.peer))
            with link.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, link)
                    await self._read(link)
        finally:
            link.into.close()
            link.written.set()  # also where nothing was begun: `drain` waits for it
            if self._links.get(link.peer) is link:
                del self._links[link.peer]
                # Shielded: the mediator would believe in the link for ever. When the node ends, `post` returns at once.
                with trio.move_on_after(LAST_WORD_S, shield=True):
                    await self._post(LinkClosed(link.peer, link.reason or "closed"))

    async def _read(self, link: _Link) -> None:
        try:
            while True:
                message = decode(await link.stream.receive_frame())
                if isinstance(message, Unrecognised):
                    self.send(link.peer, message.reply)
                else:
                    await self._post(Received(link.peer, message))
        except MeshError as error:
            link.close(str(error))

    async def _write(self, link: _Link) -> None:
        try:
            async for message in link.outgoing:
                with trio.fail_after(SEND_S):
                    await link.stream.send_frame(encode(message))
        except trio.TooSlowError:
            link.close("the peer reads too slowly")
        except MeshError as error:
            link.close(str(error))
        finally:
            link.written.set()


async def _ended(stream: Stream) -> None:
    """Read on to the end. What is said there is said again on the link that stays."""
    try:
        while True:
            await stream.receive_frame()
    except MeshError:
        pass
