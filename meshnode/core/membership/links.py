"""Which peers to dial and when, and whether a link is alive. Whom to keep a link to is decided in `membership`.

Of two links of one pair the transport keeps the one dialed by the lower node id.

Invariant: at most one dial of a peer at a time, and a wanted peer is dialed at least every `REDIAL_MAX_S`, one that
bars this node every `BARRED_REDIAL_S`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from meshnode.identity.ids import NodeId

PING_S = 1.0
"""On links whose other end this node watches."""
KEEP_S = 4.0
"""On the others: twice within the silence that ends a link, and an eighth of the traffic of pings at 8 nodes."""
TOGETHER_S = 0.25
"""Pings due within this time go out at once: a node of many links wakes four times a second, not once for each."""
SILENCE_S = 8.0
"""A link on which nothing came for so long is dead. A closed socket is known at once; this is for pulled cables and
frozen machines, and must outlast a loaded machine's slowest second."""
REDIAL_MIN_S = 0.5
REDIAL_MAX_S = 5.0
"""Half of the 10 s in which a healed partition has to be one mesh again."""
BARRED_REDIAL_S = 600.0
"""A peer that says that this node was revoked is asked again only for the case that its list was a mistake."""
GRACE_S = 3.0
"""A peer whose link was lost may come back this long before what it does for others is given up."""


@dataclass
class Link:
    """One peer, linked or not."""

    node: NodeId
    up: bool = False
    dialing: bool = False
    failures: int = 0
    dial_at: float = 0.0
    heard_at: float = 0.0
    lost_at: float | None = None
    ping_at: float = 0.0
    ping_nonce: int = 0
    ping_sent_at: float | None = None
    rtt_s: float | None = None
    error: str = ""
    barred: bool = False
    """The peer said last that this node was revoked."""
    closing: bool = False
    """Told to be closed."""
    wanted: bool = True
    """Dialed when it is down; a link that the peer wants alone is kept and never dialed."""
    watched: bool = False
    """Pinged every second."""
    dialed: bool = False
    """Opened by this node, which therefore closes it when nobody here wants it any more."""


@dataclass
class Links:
    """All links of this node."""

    links: dict[NodeId, Link] = field(default_factory=dict)
    _due: float | None = None
    _changed: bool = True
    _linked: list[NodeId] | None = None
    """Sorted once for each link that comes or goes: every event asks for them."""

    def want(self, node: NodeId, now: float) -> Link:
        """Keep a link to `node` from now on."""
        link = self.know(node, now)
        if not link.wanted:
            link.wanted, link.dial_at, self._changed = True, max(link.dial_at, now), True
        return link

    def unwant(self, node: NodeId) -> bool:
        """Keep none; True when there is one that this node opened and should close."""
        link = self.links.get(node)
        if link is None:
            return False
        link.wanted = link.watched = False
        self._changed = True
        if not link.up and not link.dialing and link.lost_at is None:
            del self.links[node]
        return link.up and link.dialed

    def watch(self, node: NodeId, now: float) -> None:
        """Ping `node` every second from now on."""
        link = self.want(node, now)
        if not link.watched:
            link.watched, link.ping_at, self._changed = True, min(link.ping_at, now + PING_S), True

    def unwatch(self, node: NodeId) -> None:
        """Ping it as seldom as any other."""
        link = self.links.get(node)
        if link is not None:
            link.watched = False

    def know(self, node: NodeId, now: float) -> Link:
        """The link record of `node`, made when it is new; new peers are dialed at once."""
        link = self.links.get(node)
        if link is None:
            link = self.links[node] = Link(node, dial_at=now)
            self._changed = True
        return link

    def forget(self, node: NodeId) -> None:
        """Never dial `node` again, until it is known anew."""
        self.links.pop(node, None)
        self._changed, self._linked = True, None

    def opened(self, node: NodeId, now: float) -> None:
        """A link came up."""
        known = node in self.links
        link = self.know(node, now)
        link.wanted, self._changed, self._linked = link.wanted and known, True, None
        link.dialed = link.dialing
        link.up, link.dialing, link.failures, link.error, link.closing = True, False, 0, "", False
        link.barred = False
        link.heard_at, link.ping_at, link.ping_sent_at, link.lost_at = now, now, None, None

    def closed(self, node: NodeId, reason: str, now: float, *, barred: bool = False) -> None:
        """A link ended, or a dial failed; `barred`: because this node was revoked."""
        link = self.know(node, now)
        self._changed, self._linked = True, None
        if link.up:
            link.lost_at = now
        link.up, link.dialing, link.closing, link.error = False, False, False, reason
        link.barred = barred
        link.dial_at = now + (BARRED_REDIAL_S if barred else min(REDIAL_MIN_S * 2**link.failures, REDIAL_MAX_S))
        link.failures = min(link.failures + 1, 16)

    def heard(self, node: NodeId, now: float) -> None:
        """Anything arrived on the link."""
        link = self.links.get(node)
        if link is not None:
            link.heard_at = now

    def pong(self, node: NodeId, nonce: int, now: float) -> None:
        """An answer to a ping: a round trip was measured."""
        link = self.links.get(node)
        if link is not None and link.ping_sent_at is not None and nonce == link.ping_nonce:
            link.rtt_s, link.ping_sent_at = now - link.ping_sent_at, None

    def up(self, node: NodeId) -> bool:
        """Whether there is a link to `node` now."""
        link = self.links.get(node)
        return link is not None and link.up

    def dials(self, now: float) -> Iterator[Link]:
        """The peers to dial now; each is marked as being dialed."""
        for link in self.links.values():
            if link.wanted and not link.up and not link.dialing and link.dial_at <= now:
                link.dialing = self._changed = True
                yield link

    def pings(self, now: float) -> Iterator[Link]:
        """The links to ping now, when any is due; each is marked as pinged with a new nonce."""
        if not any(link.up and link.ping_at <= now for link in self.links.values()):
            return
        for link in self.links.values():
            if link.up and link.ping_at <= now + TOGETHER_S:
                link.ping_at = now + (PING_S if link.watched else KEEP_S)
                link.ping_nonce, link.ping_sent_at = link.ping_nonce + 1, now
                self._changed = True
                yield link

    def silent(self, now: float) -> list[NodeId]:
        """Linked peers that said nothing for too long; each is named once."""
        found = [x for x in self.links.values() if x.up and not x.closing and now >= x.heard_at + SILENCE_S]
        for link in found:
            link.closing = self._changed = True
        return [link.node for link in found]

    def unended(self, now: float) -> list[NodeId]:
        """Peers whose silent link was to be closed long ago: that it was, got lost on its way here."""
        return [x.node for x in self.links.values() if x.up and x.closing and now >= x.heard_at + 2 * SILENCE_S]

    def given_up(self, now: float) -> list[NodeId]:
        """Wanted peers whose link was lost and did not come back in time; each is named once."""
        gone = [x for x in self.links.values() if x.lost_at is not None and now >= x.lost_at + GRACE_S]
        for link in gone:
            link.lost_at, self._changed = None, True
            if not (link.wanted or link.up or link.dialing):
                del self.links[link.node]
        return [link.node for link in gone if link.wanted]

    def touch(self) -> None:
        """A time was changed from outside."""
        self._changed = True

    def is_due(self, now: float) -> bool:
        """Whether anything here is due. What was heard since moves the next time on."""
        due = self.deadline() if self._changed else self._due
        if due is None or due > now:
            return False
        self._changed = True
        return True

    def linked(self) -> Sequence[NodeId]:
        """Peers with a link now, in an order that does not depend on when they came."""
        if self._linked is None:
            self._linked = sorted(node for node, link in self.links.items() if link.up)
        return self._linked

    def awoke(self, now: float) -> None:
        """This node did not run for a while: no link is silent for that."""
        for link in self.links.values():
            if link.up:
                link.heard_at = now

    def deadline(self) -> float | None:
        """When something here is due next."""
        if self._changed:
            times = [link.ping_at for link in self.links.values() if link.up]
            times += [link.heard_at + SILENCE_S * (1 + link.closing) for link in self.links.values() if link.up]
            times += [link.dial_at for link in self.links.values() if link.wanted and not (link.up or link.dialing)]
            times += [link.lost_at + GRACE_S for link in self.links.values() if link.lost_at is not None]
            self._due, self._changed = min(times, default=None), False
        return self._due
