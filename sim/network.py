"""Links between simulated machines: TCP as a node sees it, one stream for each dial.

Loss is no lost message: it is delay, in order, and a reset after 15 s. Messages are doubled or change their order only
when a link is dialed anew.

Invariant: what arrives on one stream arrives in the order in which it was sent, at most once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import log
from random import Random
from typing import Protocol

from meshnode.identity.ids import NodeId
from sim.agenda import Agenda

RESEND_S = 0.2
"""First retransmission time-out of Linux; doubles with each loss of the same segment."""
GIVE_UP_S = 15.0
"""TCP_USER_TIMEOUT of the real transport's order of size: a stream that gets nothing through for so long is reset."""
DIAL_S = 5.0
"""The real transport's limit for dialing and both handshakes."""
SYN_RETRIES_S = (1.0, 3.0)
OUTGOING = 512
"""Messages waiting on one stream, as in app/control: beyond, the link is closed."""
RECORD_BYTES = 22 + 4
"""TLS 1.3 record (5 header, 16 tag, 1 type) and the length before each message."""
PACKET_BYTES = 40
"""IPv4 and TCP headers of each packet of at most 1448 bytes."""


class Host(Protocol):
    """What the network needs of a machine."""

    @property
    def on(self) -> bool:
        """Whether the machine has power."""
        ...

    @property
    def listening(self) -> bool:
        """Whether the process runs."""
        ...

    def accepted(self, end: End) -> None:
        """A peer's dial was authenticated."""

    def dialed(self, end: End) -> None:
        """Its own dial was authenticated."""

    def dial_failed(self, node: NodeId, reason: str) -> None:
        """Its own dial came to nothing."""

    def arrived(self, end: End, frame: bytes) -> None:
        """A message came on `end`."""

    def ended(self, end: End, reason: str) -> None:
        """The stream of `end` is over."""


@dataclass(eq=False)
class End:
    """One side of a stream."""

    owner: NodeId
    peer: NodeId
    dialer: NodeId
    there: Way = field(repr=False)
    back: Way = field(repr=False)
    far: End = field(init=False, repr=False)
    open: bool = True
    clear_at: float = 0.0
    stalled_until: float = 0.0
    held: list[tuple[float, bytes | None]] = field(default_factory=list)
    """What waits for the way to be free, with the time of sending; None is the end of the stream."""


@dataclass(frozen=True)
class Quality:
    """How a way between two machines behaves, one direction."""

    latency_s: float
    jitter_s: float
    loss: float
    """Of a segment; each costs a resend."""
    tail: float = 0.0
    """How many of a thousand messages take up to a hundred times the jitter."""


@dataclass
class Way:
    """One direction between two machines."""

    quality: Quality
    random: Random
    blocked: int = 0
    ends: list[End] = field(default_factory=list)

    def delay(self) -> float:
        """Of one message, without loss."""
        quality = self.quality
        jitter = -log(1.0 - self.random.random()) * quality.jitter_s  # exponential, of mean 1
        if quality.tail and self.random.random() * 1000 < quality.tail:
            jitter += min(self.random.paretovariate(1.2), 100.0) * quality.jitter_s
        return quality.latency_s + jitter

    def resends(self) -> float:
        """Seconds lost by resending one message."""
        extra, wait = 0.0, RESEND_S
        while extra < GIVE_UP_S and self.random.random() < self.quality.loss:
            extra, wait = extra + wait, wait * 2
        return extra


class Network:
    """Every machine and every way between two."""

    def __init__(self, agenda: Agenda, way: Callable[[NodeId, NodeId], Way]) -> None:
        self.agenda = agenda
        self.hosts: dict[NodeId, Host] = {}
        self.frames = 0
        self.sent_bytes: dict[NodeId, int] = {}
        self._make = way
        self._ways: dict[tuple[NodeId, NodeId], Way] = {}

    def way(self, source: NodeId, target: NodeId) -> Way:
        """The way from `source` to `target`."""
        found = self._ways.get((source, target))
        if found is None:
            found = self._ways[source, target] = self._make(source, target)
        return found

    def ends(self) -> list[End]:
        """Every open side of a stream, in the order in which the ways were first used."""
        return [end for way in self._ways.values() for end in way.ends if end.open]

    # --- dialing ------------------------------------------------------------------------------------------------

    def dial(self, source: NodeId, target: NodeId) -> None:
        """Open a stream; the host of `source` hears what came of it."""
        self._syn(source, target, 0)

    def _syn(self, source: NodeId, target: NodeId, attempt: int) -> None:
        there, back = self.way(source, target), self.way(target, source)
        host = self.hosts.get(target)
        if there.blocked or back.blocked or host is None or not host.on:
            if attempt < len(SYN_RETRIES_S):
                wait = SYN_RETRIES_S[attempt] - (SYN_RETRIES_S[attempt - 1] if attempt else 0.0)
                self.agenda.after(wait, lambda: self._syn(source, target, attempt + 1))
            else:
                self.agenda.after(DIAL_S - SYN_RETRIES_S[-1], lambda: self._failed(source, target, "no answer"))
            return
        trip = there.delay() + there.resends() + back.delay() + back.resends()
        if trip * 2 > DIAL_S:
            self.agenda.after(DIAL_S, lambda: self._failed(source, target, "no answer"))
        elif not host.listening:
            self.agenda.after(trip, lambda: self._failed(source, target, "refused"))
        else:
            self.agenda.after(trip * 1.5, lambda: self._accept(source, target, trip * 0.5))

    def _failed(self, source: NodeId, target: NodeId, reason: str) -> None:
        self.hosts[source].dial_failed(target, reason)

    def _accept(self, source: NodeId, target: NodeId, half: float) -> None:
        host = self.hosts[target]
        if not host.on or not host.listening:
            self.agenda.after(half, lambda: self._failed(source, target, "reset while connecting"))
            return
        there, back = self.way(source, target), self.way(target, source)
        near, far = End(source, target, source, there, back), End(target, source, source, back, there)
        near.far, far.far = far, near
        there.ends.append(near)
        back.ends.append(far)
        # The dialer returns from `dial` with the peer's HELLO; whatever the peer sends comes behind it.
        far.clear_at = self.agenda.now + half
        self.agenda.after(half, lambda: self.hosts[source].dialed(near))
        host.accepted(far)

    # --- sending ------------------------------------------------------------------------------------------------

    def send(self, end: End, frame: bytes) -> None:
        """Put one message on the stream; nothing on one that is over."""
        if not end.open:
            return
        self.frames += 1
        size = len(frame) + RECORD_BYTES
        size += PACKET_BYTES * (1 + size // 1448)
        self.sent_bytes[end.owner] = self.sent_bytes.get(end.owner, 0) + size
        if len(end.held) >= OUTGOING:
            self.hosts[end.owner].ended(end, "the peer reads too slowly")
            self.abort(end)
            return
        self._put(end, frame)

    def close(self, end: End) -> None:
        """End the stream from this side; the other side reads its end behind what was sent."""
        if end.open:
            end.open = False
            self._put(end, None)
            if not end.held:
                self._drop(end)

    def abort(self, end: End) -> None:
        """End this side without a word: what was under way to it is lost. Power is gone, or TCP gave up."""
        end.open = False
        end.held.clear()
        self._drop(end)

    def reset(self, end: End) -> None:
        """Both sides learn that the stream broke, each at once."""
        for side in (end, end.far):
            if side.open:
                self._broke(side, "reset")

    def _broke(self, end: End, reason: str) -> None:
        if end.open:
            self.abort(end)
            self.hosts[end.owner].ended(end, reason)

    def _drop(self, end: End) -> None:
        if end in end.there.ends:
            end.there.ends.remove(end)

    def _put(self, end: End, frame: bytes | None) -> None:
        way, now = end.there, self.agenda.now
        if end.held or way.blocked or now < end.stalled_until:
            end.held.append((now, frame))
            self.agenda.after(GIVE_UP_S, lambda: self._give_up(end, now))
            return
        self._transmit(end, way, frame)
        back = end.back
        if back.blocked:  # it arrives, but no acknowledgement does
            self.agenda.after(GIVE_UP_S, lambda: self._broke(end, "no acknowledgement") if back.blocked else None)

    def _transmit(self, end: End, way: Way, frame: bytes | None) -> None:
        extra = way.resends()
        if extra >= GIVE_UP_S:
            self.agenda.after(GIVE_UP_S, lambda: self._broke(end, "timed out"))
            end.stalled_until = self.agenda.now + GIVE_UP_S + 1
            return
        end.clear_at = max(end.clear_at, self.agenda.now + way.delay() + extra)
        self.agenda.at(end.clear_at, partial(self._deliver, end.far, frame))

    def _deliver(self, end: End, frame: bytes | None) -> None:
        host = self.hosts[end.owner]
        if not host.on:
            # Nobody acknowledges: the sender gives up in its time.
            far = end.far
            self.agenda.after(GIVE_UP_S, lambda: self._broke(far, "timed out"))
        elif not end.open:
            if frame is not None:  # data for a closed socket is answered by a reset
                far, way = end.far, end.there
                if not way.blocked:
                    self.agenda.after(way.delay(), lambda: self._broke(far, "reset"))
        elif frame is None:
            self._broke(end, "closed")
        else:
            host.arrived(end, frame)

    def _give_up(self, end: End, sent_at: float) -> None:
        if end.held and end.held[0][0] <= sent_at:
            end.held.clear()
            self._broke(end, "timed out")

    # --- faults -------------------------------------------------------------------------------------------------

    def block(self, source: NodeId, target: NodeId) -> None:
        """Nothing gets from `source` to `target` any more; blocks add up."""
        self.way(source, target).blocked += 1

    def unblock(self, source: NodeId, target: NodeId) -> None:
        """Take one block away; what waited goes at the next resend."""
        way = self.way(source, target)
        way.blocked = max(0, way.blocked - 1)
        if not way.blocked:
            for end in list(way.ends):
                self.agenda.after(self._backoff(way, end), partial(self._flush, end))

    def stall(self, end: End, seconds: float) -> None:
        """The stream takes nothing for a while, all others do."""
        end.stalled_until = self.agenda.now + seconds
        self.agenda.after(seconds, lambda: self._flush(end))

    def _backoff(self, way: Way, end: End) -> float:
        """A sender that waited e seconds tries again within e more."""
        waited = self.agenda.now - end.held[0][0] if end.held else 0.0
        return way.random.uniform(0.0, min(max(waited, RESEND_S), GIVE_UP_S))

    def _flush(self, end: End) -> None:
        way = end.there
        if way.blocked or self.agenda.now < end.stalled_until:
            return
        held, end.held = end.held, []
        for _, frame in held:
            self._transmit(end, way, frame)
        if not end.open:
            self._drop(end)
