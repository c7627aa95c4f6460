"""Who watches whom: for every member the K others that rank highest for it, by rendezvous hash.

Invariant: the ranking depends on the set of members alone, so nodes with equal rosters agree on it without a word.
"""

from __future__ import annotations

import hashlib
from bisect import insort
from functools import lru_cache
from heapq import nsmallest
from itertools import repeat

from meshnode.identity.ids import NodeId

OBSERVERS = 4
"""Of each node, where there are so many: two must agree, and two may be down at the same time."""
RANKED = 2 * OBSERVERS
"""Kept for each node, and believed: rosters differ for a moment, and so do the four."""


@lru_cache(maxsize=1 << 18)
def weight(observer: NodeId, target: NodeId) -> bytes:
    """The rank of `observer` for `target`; the lowest watch."""
    return hashlib.sha256(f"{observer}>{target}".encode()).digest()[:16]


class Observers:
    """The ring over the members that are alive, this node among them."""

    def __init__(self) -> None:
        self._there: dict[NodeId, None] = {}
        self._new: list[NodeId] = []
        """Those of them that are not ranked yet: a mesh that comes up is ranked in a few steps, not once a member."""
        self._ranked: dict[NodeId, list[tuple[bytes, NodeId]]] = {}

    def __len__(self) -> int:
        return len(self._there)

    def __contains__(self, node: NodeId) -> bool:
        return node in self._there

    def add(self, node: NodeId) -> None:
        """A member is alive."""
        if node not in self._there:
            self._there[node] = None
            self._new.append(node)

    def remove(self, node: NodeId) -> None:
        """It is no longer."""
        ranked_now = self._all()
        if node not in self._there:
            return
        del self._there[node], ranked_now[node]
        for target, ranked in ranked_now.items():
            if any(other == node for _, other in ranked):
                ranked_now[target] = self._rank(target)

    def count(self) -> int:
        """K: how many watch each node."""
        return min(len(self._there) - 1, OBSERVERS)

    def of(self, target: NodeId) -> list[NodeId]:
        """Those who watch `target`."""
        return [node for _, node in self._all().get(target, ())[:OBSERVERS]]

    def believed(self, observer: NodeId, target: NodeId) -> bool:
        """Whether `observer` watches `target` in this view, or would in one that differs a little."""
        ranked = self._all().get(target) or self._rank(target)
        return any(node == observer for _, node in ranked)

    def watched_by(self, node: NodeId) -> list[NodeId]:
        """Those whom `node` watches."""
        return [t for t, ranked in self._all().items() if any(o == node for _, o in ranked[:OBSERVERS])]

    def _all(self) -> dict[NodeId, list[tuple[bytes, NodeId]]]:
        new, self._new = self._new, []
        if new:
            for target, ranked in self._ranked.items():
                for node in new:
                    if len(ranked) < RANKED or weight(node, target) < ranked[-1][0]:
                        insort(ranked, (weight(node, target), node))
                        del ranked[RANKED:]
            for node in new:
                self._ranked[node] = self._rank(node)
        return self._ranked

    def _rank(self, target: NodeId) -> list[tuple[bytes, NodeId]]:
        others = [other for other in self._there if other != target]
        return nsmallest(RANKED, zip(map(weight, others, repeat(target)), others, strict=True))
