"""What this node says of itself: its numbers, when it speaks, and the alarm when somebody else speaks with its key.

Invariant: no number is used twice, and announcements are at least `CHANGE_S` apart but for the last word.
"""

from __future__ import annotations

import msgspec

from meshnode.core.membership.announcement import Authority, Body, announce, fingerprint, read
from meshnode.core.membership.gossip import Draw
from meshnode.wire.messages import Announce

REFRESH_S = 60.0
"""An announcement is repeated so often at least, and lives three times as long."""
JITTER_S = 10.0
"""Taken off at random: nodes that started together do not speak together."""
CHANGE_S = 1.0
"""Between two announcements: load and measurements ride on the refresh."""
SETTLE_S = 0.2
"""Changes within this time travel together."""
COPIED_S = 3600.0
"""A disk that was restored jumps ahead once; who has to jump twice within this time has a copied key."""


class Voice:
    """This node's own announcement."""

    def __init__(self, authority: Authority, incarnation: int, draw: Draw, now: float) -> None:
        self.authority = authority
        self.incarnation = incarnation
        self.sequence = 0
        self.record: Announce | None = None
        self.body: Body | None = None
        self.alarm = ""
        """Why this node takes part in no plan; empty in all but a copied key."""
        self.due_at = now
        self._draw = draw
        self._spoken_at = now - CHANGE_S
        self._jumped_at: float | None = None

    def soon(self, now: float, *, settle: float = SETTLE_S) -> None:
        """Something changed: speak when more may have, and not more often than allowed."""
        self.due_at = min(self.due_at, max(now + settle, self._spoken_at + CHANGE_S))

    def speak(self, body: Body, now: float) -> Announce:
        """Sign `body` under the next number."""
        self.sequence += 1
        self.body = msgspec.structs.replace(
            body,
            incarnation=self.incarnation,
            sequence=self.sequence,
            certificate=fingerprint(self.authority.chain),
            alarm=bool(self.alarm),
        )
        self.record = announce(self.body, self.authority)
        self._spoken_at = now
        self.due_at = now + REFRESH_S - JITTER_S * int.from_bytes(self._draw(2), "big") / 65536
        return self.record

    def heard_itself(self, record: Announce, now: float, *, verify: bool) -> bool:
        """Somebody passed on a record with this node's key; True when it forces a new number. Raises PeerError."""
        own = self.record
        if own is not None and (record.body, record.signature) == (own.body, own.signature):
            return False
        author = self.authority.admit(self.authority.chain)
        told = read(record, author, self.authority.mesh, verify=verify)
        if told.number < (self.incarnation, self.sequence) or (self.alarm and told.alarm):
            return False  # where both know, neither has to have the last word; one that was restarted has to be told
        if told.incarnation == self.incarnation:
            self.alarm = "another node speaks with this node's key: its data directory was copied"
            self.sequence = told.sequence
        else:
            if self._jumped_at is not None and now < self._jumped_at + COPIED_S:
                self.alarm = "another node keeps speaking with this node's key: its data directory was copied"
            self._jumped_at = now
            self.incarnation, self.sequence = told.incarnation + 1, 0
        self.soon(now, settle=0.0)
        return True
