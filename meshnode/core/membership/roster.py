"""The members known here, each with its newest announcement.

Invariant: what is stored was signed by its author, and no entry ever goes back to an older number. Merging is
commutative, associative and idempotent: the newest (incarnation, sequence) of each author wins, whoever brings it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meshnode.core.membership.announcement import Author, Authority, Body, read
from meshnode.errors import PeerError
from meshnode.identity.ids import NodeId
from meshnode.wire.messages import Announce

MEMBERS = 512
"""Authors remembered: twice the largest mesh designed for; a stolen issuer key cannot grow it further."""


@dataclass(frozen=True)
class Entry:
    """One member: the record as it travels, and what it says."""

    record: Announce
    body: Body
    received_at: float
    left: bool = False


@dataclass
class Roster:
    """All members but this node itself."""

    authority: Authority
    entries: dict[NodeId, Entry] = field(default_factory=dict)
    authors: dict[NodeId, Author] = field(default_factory=dict)
    chains: dict[NodeId, tuple[bytes, ...]] = field(default_factory=dict)

    def introduce(self, chain: tuple[bytes, ...]) -> NodeId:
        """Learn an author. Raises PeerError when the chain proves none, or the roster is full."""
        author = self.authority.admit(chain)
        if author.node not in self.authors and len(self.authors) >= MEMBERS:
            raise PeerError("the roster is full")
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
        if known is not None and known.record == record:
            return False
        body = read(record, author, self.authority.mesh)
        if known is not None and body.number <= known.body.number:
            return False
        self.entries[record.author] = Entry(record, body, now)
        return True

    def leave(self, node: NodeId) -> None:
        """A clean goodbye: kept in the list, no longer dialed or planned with, until it announces itself anew."""
        entry = self.entries.get(node)
        if entry is not None:
            self.entries[node] = Entry(entry.record, entry.body, entry.received_at, left=True)

    def forget(self, older_than: float) -> list[NodeId]:
        """Drop who was last heard of before `older_than`; their ids."""
        gone = [node for node, entry in self.entries.items() if entry.received_at < older_than]
        for node in gone:
            del self.entries[node], self.authors[node], self.chains[node]
        return gone

    def body(self, node: NodeId) -> Body | None:
        """What `node` last said, if it is a member that has not left."""
        entry = self.entries.get(node)
        return None if entry is None or entry.left else entry.body
