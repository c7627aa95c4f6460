"""The best nodes, order and cuts at one context and number of lanes.

One node that holds the whole model is the rule; several are the answer where none does, or where several are
predicted to be faster by more than predictions are wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from meshnode.core.planning.bounded import BUDGET_CELLS, chain, improved
from meshnode.core.planning.exact import EXACT_NODES, all_seats, dominators
from meshnode.core.planning.fit import Fit
from meshnode.core.planning.footprint import ModelFootprint
from meshnode.core.planning.inventory import NodeInventory
from meshnode.core.planning.lattice import Found, Lattice, Slices
from meshnode.core.planning.pace import NEVER, Pace
from meshnode.core.planning.participants import missing_bytes
from meshnode.identity.ids import NodeId
from meshnode.wire.limits import STAGES

SPLIT_PERCENT = 15
"""A pipeline must be predicted so much faster than the best single node: predictions are held to 15 %, so a smaller
gain may be a loss, and "more nodes made it slower" is what people complain of first."""

NEAR_PERCENT = 3
"""Single nodes whose predictions differ by less are equally fast: two measurements of one machine differ by that, and
the one that need not fetch the file comes first."""


MORE_NODES = 6
"""The most promising nodes are smaller than the largest: so many more of them are tried for a start."""


@dataclass(frozen=True)
class Choice:
    """A placement, and the single node to compare it with."""

    found: Found
    single: Found | None


class Chooser:
    """Looks for the best placement on `nodes` (largest memory first, then lower id)."""

    def __init__(
        self,
        footprint: ModelFootprint,
        fit: Fit,
        pace: Pace,
        author: NodeId,
    ) -> None:
        self._fit = fit
        self._pace = pace
        self._nodes: Sequence[NodeInventory] = pace.nodes
        self._rooms = [node.usable_bytes for node in self._nodes]
        everything = missing_bytes(footprint, NodeInventory(NodeId(""), "", 0))
        digest = footprint.manifest_digest
        self._held = [frozenset(node.cached.get(digest, ())) for node in self._nodes]
        missing = [
            missing_bytes(footprint, node) if held else everything
            for node, held in zip(self._nodes, self._held, strict=True)
        ]
        for index, node in enumerate(self._nodes):
            if node.node == author:  # it has the file
                missing[index] = (0,) * len(everything)
                self._held[index] = frozenset().union(*self._held, {"the file"})
        self._missing = missing
        by_id = sorted(range(len(self._nodes)), key=lambda index: self._nodes[index].node)
        self._ranks = [0] * len(by_id)
        for rank, index in enumerate(by_id):
            self._ranks[index] = rank
        self._slices = Slices(fit.cuts, fit.costs, pace, missing)

    def choose(self) -> Choice | None:
        """The best placement; None where no nodes hold the model."""
        seed = self._fit.fewest(self._rooms)
        if seed is None:
            return None
        single = self._single()
        if single is None:
            split = self._split(seed, NEVER)
            return None if split is None else Choice(split, None)
        ceiling = single.time * (100 - SPLIT_PERCENT) // 100
        split = self._split(single.order, ceiling)
        return Choice(single if split is None else split, single)

    def _single(self) -> Found | None:
        pace, last = self._pace, self._slices.layers
        found = []
        for index, node in enumerate(self._nodes):
            time = pace.total((index,), (last,))
            if self._fit.whole(node.usable_bytes) and time < NEVER:
                fetch = sum(self._missing[index][-4:])
                found.append((time, fetch, -node.usable_bytes, self._ranks[index], index))
        if not found:
            return None
        near = min(found)[0] * (100 + NEAR_PERCENT)
        best = min((one for one in found if one[0] * 100 <= near), key=lambda one: (one[1], *one))
        return Found((best[-1],), (last,), best[0])

    def _split(self, start: tuple[int, ...], ceiling: int) -> Found | None:
        """The best pipeline of two and more nodes that takes less than `ceiling`, or None."""
        pace = self._pace
        upper = ceiling
        if len(start) > 1:
            upper = min(upper, self._time_of(start))
        most = min(len(self._nodes), self._fit.cuts.stages_max, STAGES)
        while most > 1 and pace.least(most) > upper:
            most -= 1
        if most < 2:
            return None
        dominated = dominators(pace, self._held, self._ranks)
        seats = all_seats(self._slices, dominated, most)
        if seats is None:
            order = self._climb(start, most, dominated)
            found = Lattice(self._slices, chain(self._slices, order), self._ranks).best() if len(order) > 1 else None
        else:
            found = Lattice(self._slices, seats, self._ranks).best()
        return found if found is not None and found.time < ceiling else None

    def _climb(self, start: tuple[int, ...], most: int, dominated: Sequence[int]) -> tuple[int, ...]:
        """From several starts half of the budget; the best of what they reach climbs on with the other half."""
        ranked = self._promising()
        starts = [start, *self._starts(start, most, dominated, ranked)]
        budget = BUDGET_CELLS // 2
        orders = [improved(self._slices, order, ranked, (most, budget // len(starts))) for order in starts]
        best = min(orders, key=lambda order: (self._time_of(order), order))
        return improved(self._slices, best, ranked, (most, budget))

    def _starts(
        self, start: tuple[int, ...], most: int, dominated: Sequence[int], ranked: Sequence[int]
    ) -> Iterator[tuple[int, ...]]:
        """The best order of the few most promising nodes; and, where that many are needed, some order of about as many
        of them as the largest would do with."""
        few = sorted(ranked[:EXACT_NODES])  # never too many
        best = Lattice(self._slices, all_seats(self._slices, dominated, most, few) or (), self._ranks).best()
        if best is not None:
            yield best.order
        for count in range(len(start), min(len(ranked), len(start) + MORE_NODES) + 1) if len(start) > 1 else ():
            order = self._fit.find_order([self._rooms[index] for index in ranked[:count]])
            if order is not None:
                yield tuple(ranked[index] for index in order)
                return

    def _promising(self) -> list[int]:
        """Nodes by time for each byte of layers, were each to take as much as it can."""
        pace, ranked = self._pace, []
        for index, room in enumerate(self._rooms):
            most = self._fit.most(room)
            if most > 0:
                tempo = pace.tempos[index]
                hops = sorted(pace.forward[: len(self._rooms), index].tolist())
                near = hops[1] if len(hops) > 1 else 0  # hops[0] is the one to itself
                ranked.append(((most * tempo.byte + tempo.step + near) * 1000 // most, index))
        return [index for _, index in sorted(ranked)]

    def _time_of(self, order: tuple[int, ...]) -> int:
        return Lattice(self._slices, chain(self._slices, order), self._ranks).least_time()
