"""Who watches whom: for every member the K others that rank highest for it, by rendezvous hash.

Invariant: the ranking depends on the set of members alone, so nodes with equal rosters agree on it without a word.
"""

from __future__ import annotations

import hashlib
from bisect import insort
from functools import lru_cache

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
        self._ranked: dict[NodeId, list[tuple[bytes, NodeId]]] = {}

    def __len__(self) -> int:
        return len(self._ranked)

    def __contains__(self, node: NodeId) -> bool:
        return node in self._ranked

    def add(self, node: NodeId) -> None:
        """A member is alive."""
        if node in self._ranked:
            return
        for target, ranked in self._ranked.items():
            place = (weight(node, target), node)
            if len(ranked) < RANKED or place < ranked[-1]:
                insort(ranked, place)
                del ranked[RANKED:]
        self._ranked[node] = self._rank(node)

    def remove(self, node: NodeId) -> None:
        """It is no longer."""
        if self._ranked.pop(node, None) is None:
            return
        for target, ranked in self._ranked.items():
            if any(other == node for _, other in ranked):
                self._ranked[target] = self._rank(target)

    def count(self) -> int:
        """K: how many watch each node."""
        return min(len(self._ranked) - 1, OBSERVERS)

    def of(self, target: NodeId) -> list[NodeId]:
        """Those who watch `target`."""
        return [node for _, node in self._ranked.get(target, ())[:OBSERVERS]]

    def believed(self, observer: NodeId, target: NodeId) -> bool:
        """Whether `observer` watches `target` in this view, or would in one that differs a little."""
        ranked = self._ranked.get(target) or self._rank(target)
        return any(node == observer for _, node in ranked)

    def watched_by(self, node: NodeId) -> list[NodeId]:
        """Those whom `node` watches."""
        return [t for t, ranked in self._ranked.items() if any(o == node for _, o in ranked[:OBSERVERS])]

    def _rank(self, target: NodeId) -> list[tuple[bytes, NodeId]]:
        return sorted((weight(other, target), other) for other in self._ranked if other != target)[:RANKED]
