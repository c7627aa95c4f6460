"""Whom to keep a link to: everybody up to 16 nodes; above, the observer ring and a few at random.

Invariant: above 16 nodes the number of links that a node opens does not depend on the size of the mesh.
"""

from __future__ import annotations

from collections.abc import Iterable

from meshnode.core.membership.gossip import SMALL, Draw, pick
from meshnode.core.membership.links import Links
from meshnode.core.membership.observers import Observers
from meshnode.core.membership.roster import Roster
from meshnode.identity.ids import NodeId

RANDOM = 4
"""Links drawn at random besides the ring: a ring that falls apart is still one mesh."""
REDRAW_S = 300.0


class Standing:
    """The choice of links; carried out on `links`."""

    def __init__(self, roster: Roster, links: Links, ring: Observers, draw: Draw) -> None:
        self._roster = roster
        self._links = links
        self._ring = ring
        self._draw = draw
        self._drawn: list[NodeId] = []
        self._drawn_at: float | None = None
        self._sought: NodeId | None = None
        self.size = 1
        """Members alive, this node among them."""
        self.partners: frozenset[NodeId] = frozenset()
        """Nodes of the runs that this node takes part in."""
        self.watched: list[NodeId] = []
        """Those whom this node observes."""

    def seek(self) -> None:
        """Try one member that is not there, another one each time: two halves of a mesh find each other again.

        Up to 16 nodes everybody but who left is tried anyway; a node that is left alone tries those too: they may have
        come back while nobody could tell.
        """
        away = [(node, entry) for node, entry in self._roster.entries.items() if not entry.present]
        if self.size > SMALL:
            candidates = [node for node, entry in away if not entry.left]
        else:
            self._drawn, self._drawn_at = [], None
            candidates = [node for node, _ in away] if self.size == 1 else []
        self._sought = next(iter(pick(self._draw, candidates, 1)), None)

    def choose(self, hints: Iterable[NodeId], now: float) -> list[NodeId]:
        """Want and watch whom to link to; the links to close."""
        own = self._roster.authority.node
        present = [node for node, entry in self._roster.entries.items() if entry.present]
        self.size = len(present) + 1
        self.watched = self._ring.watched_by(own)
        wanted = {*hints, *self.watched, *self._ring.of(own), *self.partners}
        if self.size <= SMALL:
            wanted.update(node for node, entry in self._roster.entries.items() if not entry.left)
        else:
            wanted.update(self._at_random(present, now))
        if self._sought is not None:
            wanted.add(self._sought)
        wanted.discard(own)
        for node in sorted(wanted):
            self._links.want(node, now)
        # Whether the holder of a run is there is judged after 2 s of silence (COORDINATION): partners are pinged often.
        watched = {*self.watched, *self.partners}
        close = []
        for node in list(self._links.links):
            if node in watched:
                self._links.watch(node, now)
            else:
                self._links.unwatch(node)
            if node not in wanted and self._links.unwant(node):
                close.append(node)
        return close

    def _at_random(self, present: list[NodeId], now: float) -> list[NodeId]:
        there = set(present)
        self._drawn = [node for node in self._drawn if node in there]
        if self._drawn_at is None or now >= self._drawn_at + REDRAW_S:
            self._drawn, self._drawn_at = [], now
        others = [node for node in present if node not in self._drawn]
        self._drawn += pick(self._draw, others, RANDOM - len(self._drawn))
        return self._drawn
