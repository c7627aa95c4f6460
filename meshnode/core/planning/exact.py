"""Every set and order of nodes that a best placement could use, as one lattice; or word that it would be too many.

A node A dominates a node B when a placement that uses B and not A gets no worse by putting A where B is: at least the
memory, speed, ways and cached bytes. So a best placement uses a node only together with all that dominate it: of a
hundred equal machines only as many are looked at as can be needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meshnode.core.planning.lattice import START, Seat, Slices
from meshnode.core.planning.pace import NEVER, Pace

EXACT_NODES = 6
"""Up to here always exact: 192 seats, or 486 where the head moves with stage 0."""

EXACT_CELLS = 16_000_000
"""Above, exact while seats x (cells of a matrix + CELLS_A_SEAT) stay below this: counted, not timed, so that every
machine decides the same: 8 nodes with 100 layers, or 9 with 24."""

CELLS_A_SEAT = 4_000
"""What a seat costs whatever the size of its matrix: the calls."""


def dominators(pace: Pace, held: Sequence[frozenset[str]], ranks: Sequence[int]) -> list[int]:
    """For each node the set (as bits) of those that dominate it; no two dominate each other.

    `held`: artifacts that lie on each node's disk. `ranks`: the place of each id among all ids.
    """
    count = len(pace.nodes)
    room = np.array([min(node.usable_bytes, 1 << 62) for node in pace.nodes], np.int64)
    byte = np.array([tempo.byte for tempo in pace.tempos], np.int64)
    layer = np.array([tempo.layer for tempo in pace.tempos], np.int64)
    step = np.array([tempo.step for tempo in pace.tempos], np.int64)
    place = np.array(ranks, np.int64)
    diagonal = np.eye(len(pace.forward), count, dtype=np.bool_)
    found = [0] * count
    for a in range(count):
        better = (room[a] >= room) & (byte[a] <= byte) & (layer[a] <= layer) & (step[a] <= step)
        better &= (room[a] > room) | (byte[a] < byte) | (place[a] < place)
        better[a] = False
        if not better.any():
            continue
        for ways in (pace.forward, pace.forward.T, pace.small, pace.small.T):  # to and from every third node
            nearer = (ways[:, a, None] <= ways[:, :count]) | diagonal
            nearer[a] = True
            better &= nearer.all(axis=0)
        for b in np.flatnonzero(better).tolist():
            if held[a] >= held[b]:
                found[b] |= 1 << a
    return found


def all_seats(
    slices: Slices, dominated: Sequence[int], most: int, only: Sequence[int] | None = None
) -> list[Seat] | None:
    """Every way to use 2 to `most` nodes (of `only` these, if given); None where that is more than may be counted.

    `dominated`: from `dominators`.
    """
    candidates = range(len(dominated)) if only is None else only
    among = sum(1 << node for node in candidates)
    builder = _Builder(slices.pace, [better & among for better in dominated], most)
    few = len(candidates) <= EXACT_NODES
    return builder.build(candidates, None if few else EXACT_CELLS // (slices.cells + CELLS_A_SEAT))


class _Builder:
    """Grows sets of nodes one by one; a seat is (stage 0's node, set, last node)."""

    def __init__(self, pace: Pace, dominated: Sequence[int], most: int) -> None:
        self._pace = pace
        self._dominated = dominated
        self._most = most
        self._hops = pace.forward.tolist()
        self._seats: list[Seat] = []

    def build(self, candidates: Sequence[int], limit: int | None) -> list[Seat] | None:
        pace = self._pace
        usable = [node for node in candidates if self._bearable(1 << node)]
        if limit is not None and len(usable) > limit:
            return None
        level: dict[tuple[int, int, int], int] = {}
        for node in usable:
            if pace.enter(node) < NEVER:
                first = node if pace.home is None else -1  # only then it matters how the pipeline began
                level[first, 1 << node, node] = self._add(node, ((START, pace.enter(node)),), NEVER, 1, 0)
        for depth in range(2, self._most + 1):
            ways: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
            for (first, used, last), seat in level.items():
                for node in usable:
                    hop = self._hops[last][node]
                    if not used >> node & 1 and hop < NEVER and self._bearable(used | 1 << node):
                        ways.setdefault((first, used | 1 << node, node), []).append((seat, hop))
                if limit is not None and len(self._seats) + len(ways) > limit:
                    return None
            level = {}
            for (first, used, node), before in ways.items():
                back = pace.back(node, first) if self._closed(used) else NEVER
                memory = self._seats[before[0][0]].memory
                level[first, used, node] = self._add(node, tuple(before), back, depth, memory)
            if not level:
                break
        return self._seats

    def _add(self, node: int, before: tuple[tuple[int, int], ...], back: int, depth: int, memory: int) -> int:
        memory += self._pace.nodes[node].usable_bytes
        self._seats.append(Seat(node, before, back, depth, memory))
        return len(self._seats) - 1

    def _wanted(self, used: int) -> int:
        """The set with everything that dominates one of it."""
        wanted, left = used, used
        while left:
            lowest = left & -left
            wanted |= self._dominated[lowest.bit_length() - 1]
            left ^= lowest
        return wanted

    def _bearable(self, used: int) -> bool:
        """Whether a set that may end a pipeline holds this one."""
        return self._wanted(used).bit_count() <= self._most

    def _closed(self, used: int) -> bool:
        return self._wanted(used) == used
