"""The members known here, each with its newest announcement.

Invariant: what is stored was signed by its author, and no entry ever goes back to an older number. Merging is
commutative, associative and idempotent: the newest (incarnation, sequence) of each author wins, whoever brings it; of
two with one number (a copied key) the higher id wins, and the author is in conflict from then on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from meshnode.core.membership.announcement import Author, Authority, Body, fingerprint, read
from meshnode.core.membership.digest import id_of
from meshnode.errors import PeerError
from meshnode.identity.ids import NodeId
from meshnode.wire.limits import ANNOUNCEMENT_TTL_MS
from meshnode.wire.messages import Announce

MEMBERS = 512
"""Authors remembered: twice the largest mesh designed for; a stolen issuer key cannot grow it further."""
FORGET_S = 24 * 3600.0
"""Numbers are remembered so long after an announcement ended: nobody can bring an older one back, and the peer stays
listed."""
CONFLICT_S = 3600.0
"""A node whose key seems to be copied stays out of plans for so long after the last sign of it."""


@dataclass(frozen=True)
class Entry:
    """One member: the record as it travels, and what it says."""

    record: Announce
    body: Body
    received_at: float
    expires_at: float
    identity: bytes
    dead: bool = False
    """Enough observers agree that it does not answer."""
    expired: bool = False

    @property
    def left(self) -> bool:
        """Whether this is the last word of a node that went away on purpose: listed, not dialed, not planned with."""
        return self.body.left

    @property
    def present(self) -> bool:
        """Whether it counts as a member that is alive."""
        return not (self.left or self.dead or self.expired)


@dataclass
class Roster:
    """All members but this node itself."""

    authority: Authority
    verify: bool = True
    entries: dict[NodeId, Entry] = field(default_factory=dict)
    authors: dict[NodeId, Author] = field(default_factory=dict)
    chains: dict[NodeId, tuple[bytes, ...]] = field(default_factory=dict)
    conflicts: dict[NodeId, float] = field(default_factory=dict)
    changes: int = 0
    """How often `entries` became others: what is made of them is made again when this differs."""

    def introduce(self, chain: tuple[bytes, ...]) -> NodeId:
        """Learn an author. Raises PeerError when the chain proves none, or the roster is full."""
        if not chain:
            raise PeerError("an introduction of nobody")
        author = self.authority.admit(chain)
        if author.node not in self.authors and len(self.authors) >= MEMBERS:
            raise PeerError("the roster is full")
        if self._is_told(author.node) and fingerprint(chain) != self.entries[author.node].body.certificate:
            return author.node  # an old certificate, from somebody who knows no newer one
        self.authors[author.node] = author
        self.chains[author.node] = chain
        return author.node

    def offer(self, record: Announce, now: float) -> bool:
        """Merge one record; True when it was news. Raises PeerError for one that nobody may pass on."""
        author = self.authors.get(record.author)
        if author is None:
            raise PeerError("an announcement of an author who was not introduced")
        if record.author == self.authority.node:
            return False
        known = self.entries.get(record.author)
        if known is not None and known.record.body == record.body and known.record.signature == record.signature:
            return False
        body = read(record, author, self.authority.mesh, verify=self.verify)
        identity = id_of(record)
        if known is not None:
            if body.number < known.body.number or identity == known.identity:
                return False
            if body.number == known.body.number:
                self.conflicts[body.node] = now
                if identity < known.identity:
                    return False
        if body.alarm:
            self.conflicts[body.node] = now
        expires_at = now + min(max(record.remaining_ms, 0), ANNOUNCEMENT_TTL_MS) / 1000
        kept = Announce(record.author, record.body, record.signature)
        self.entries[record.author] = Entry(kept, body, now, expires_at, identity)
        self.changes += 1
        return True

    def outgoing(self, node: NodeId, now: float) -> Announce | None:
        """The record of `node` with the time that is left of it; None when none is."""
        entry = self.entries.get(node)
        if entry is None or entry.expired:
            return None
        remaining_ms = max(0, int((entry.expires_at - now) * 1000))
        return Announce(node, entry.record.body, entry.record.signature, remaining_ms)

    def current(self, node: NodeId) -> bool:
        """Whether the chain known of `node` is the one that its newest announcement names."""
        if node not in self.chains:
            return False
        entry = self.entries.get(node)
        return entry is None or entry.body.certificate in (b"", fingerprint(self.chains[node]))

    def bury(self, node: NodeId) -> None:
        """Observers agree that it is dead; a higher number brings it back."""
        self._mark(node, dead=True)

    def expire(self, now: float) -> list[NodeId]:
        """Mark whose time is over; their ids."""
        over = [node for node, entry in self.entries.items() if not entry.expired and entry.expires_at <= now]
        for node in over:
            self._mark(node, expired=True)
        return over

    def forget(self, now: float) -> list[NodeId]:
        """Drop whose announcement ended a day ago; their ids."""
        gone = [node for node, entry in self.entries.items() if entry.expires_at + FORGET_S <= now]
        for node in gone:
            self.remove(node)
        self.conflicts = {node: at for node, at in self.conflicts.items() if now < at + CONFLICT_S}
        return gone

    def remove(self, node: NodeId) -> None:
        """Know nothing of it any more."""
        self.entries.pop(node, None)
        self.changes += 1
        self.authors.pop(node, None)
        self.chains.pop(node, None)

    def body(self, node: NodeId) -> Body | None:
        """What `node` last said, if it is a member that has not left."""
        entry = self.entries.get(node)
        return None if entry is None or entry.left else entry.body

    def _mark(self, node: NodeId, *, dead: bool = False, expired: bool = False) -> None:
        entry = self.entries.get(node)
        if entry is not None:
            self.entries[node] = replace(entry, dead=entry.dead or dead, expired=entry.expired or expired)
            self.changes += 1

    def _is_told(self, node: NodeId) -> bool:
        entry = self.entries.get(node)
        return node in self.chains and entry is not None and entry.body.certificate == fingerprint(self.chains[node])
