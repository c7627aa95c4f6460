"""Whether nodes of given sizes can hold a model at all, whatever their speed: bit sets, fast.

Every order of up to EXACT_NODES nodes is covered; of more, a bounded list. Says nothing about which order is best
(`choice`), and nothing about links.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from meshnode.core.planning.context import Costs
from meshnode.core.planning.cuts import Cuts
from meshnode.wire.limits import STAGES

EXACT_NODES = 8
"""Up to here every order is covered (2^8 sets x 8 nodes, 20 ms); more would not stay below the planner's 200 ms."""

ORDERS_A_SET = 16
"""Orders tried for one set of more nodes. For equal layers and free cuts the first ones decide."""

ORDERS_TRIED = 128
"""Orders tried for all sets together, at one context: counted, not timed, so that every machine tries the same. With
half of them one of 300 plans of 64 and 128 nodes is missed."""

ORDERS_ADVISED = 32
"""For each of a dozen questions that a shortfall's advice asks: it may name a little more than would be enough."""

_ENDS_TRIED = 8
"""Candidates for each end of a pipeline, those that lose least: 64 pairs, more than are tried."""


class Fit:
    """Whether given node sizes, in a given order, can hold the model at one context."""

    def __init__(self, cuts: Cuts, costs: Costs) -> None:
        self.cuts = cuts
        self.costs = costs
        self._reach: dict[int, tuple[int, ...]] = {}
        self._best: dict[int, int] = {}
        self._last: dict[int, int] = {}
        self._fewest: dict[tuple[int, ...], tuple[int, ...] | None] = {}
        self._orders_left = ORDERS_TRIED
        self._allowed = tuple(sum(1 << end for end in ends) for ends in cuts.ends)

    def whole(self, room: int) -> bool:
        """Whether a node of this size may hold the whole model alone, and can."""
        return bool(self.reach(room)[0] >> self.costs.layers & 1)

    def most(self, room: int) -> int:
        """Bytes of layers that a node of this size can take at best."""
        known = self._best.get(room)
        if known is None:
            prefix = self.costs.prefix
            slices = ((first, ends) for first, ends in enumerate(self.reach(room)) if ends)
            known = max((prefix[ends.bit_length() - 1] - prefix[first] for first, ends in slices), default=0)
            self._best[room] = known
        return known

    def fewest(self, rooms: Sequence[int], orders: int = ORDERS_TRIED) -> tuple[int, ...] | None:
        """The smallest number of nodes that hold the model, as indices in an order that does. `rooms`: largest first.

        The k largest decide whether k nodes can do it at all: in any split that fits, a larger node can stand in for a
        smaller one. So no subset is enumerated.
        """
        key = tuple(rooms)
        if key not in self._fewest:
            self._orders_left = orders
            self._fewest[key] = self._find_fewest(rooms)
        return self._fewest[key]

    def _find_fewest(self, rooms: Sequence[int]) -> tuple[int, ...] | None:
        if rooms and self.whole(rooms[0]):
            return (0,)
        for count in range(2, min(len(rooms), self.cuts.stages_max, STAGES) + 1):
            order = self.find_order(rooms[:count])
            if order is not None:
                return order
        return None

    def reach(self, room: int) -> tuple[int, ...]:
        """For each first layer, the set (as bits) of the ends that fit into `room` bytes."""
        known = self._reach.get(room)
        if known is None:
            known = self._reach[room] = self._reached(room)
        return known

    def _reached(self, room: int) -> tuple[int, ...]:
        costs, layers = self.costs, self.costs.layers
        prefix, end = costs.prefix, 1 << layers
        found, furthest = [], 0
        for first, allowed in enumerate(self._allowed):
            limit = prefix[first] + room - costs.each - (costs.embedding if first == 0 else 0)
            while furthest < layers and prefix[furthest + 1] <= limit:
                furthest += 1  # grows with `first`: a slice that begins later ends later
            ends = allowed & ((2 << furthest) - 1) & ~end
            if allowed & end and costs.need(first, layers) <= room:
                ends |= end
            found.append(ends)
        return tuple(found)

    def _latest(self, room: int) -> int:
        """Where the longest slice that ends with the model begins; `layers`: this node cannot be the last."""
        known = self._last.get(room)
        if known is None:
            reach, layers = self.reach(room), self.costs.layers
            known = next((first for first in range(1, layers) if reach[first] >> layers & 1), layers)
            self._last[room] = known
        return known

    def holds(self, rooms: Sequence[int]) -> bool:
        """Whether nodes of these sizes, in this order and all used, hold every layer."""
        layers = self.costs.layers
        reached = 1
        for room in rooms:
            ends = self.reach(room)
            following = 0
            for first in _bits(reached & ~(1 << layers)):
                following |= ends[first]
            reached = following
            if not reached:
                return False
        return bool(reached >> layers & 1)

    def find_order(self, rooms: Sequence[int]) -> tuple[int, ...] | None:
        """Indices of `rooms` in an order that holds every layer, or None. Exact for EXACT_NODES and fewer."""
        if not self._could_hold(rooms):
            return None
        if len(rooms) <= EXACT_NODES:
            return self._exact_order(rooms)
        for order in islice(self._likely_orders(rooms), min(ORDERS_A_SET, self._orders_left)):
            self._orders_left -= 1
            if self.holds([rooms[index] for index in order]):
                return order
        return None

    def _could_hold(self, rooms: Sequence[int]) -> bool:
        """Necessary, and cheap: enough bytes in all, also when each node takes the best slice it could."""
        costs = self.costs
        if costs.need(0, costs.layers) + costs.each * (len(rooms) - 1) > sum(rooms):
            return False
        return sum(map(self.most, rooms)) >= costs.prefix[-1]

    def _exact_order(self, rooms: Sequence[int]) -> tuple[int, ...] | None:
        """Dynamic programming over sets of nodes: the boundaries that a set, in some order, can end at."""
        layers, everything = self.costs.layers, (1 << len(rooms)) - 1
        reached = [0] * (everything + 1)
        reached[0] = 1
        for used in range(everything):
            starts = tuple(_bits(reached[used] & ~(1 << layers)))
            for index, room in enumerate(rooms):
                if not used >> index & 1:
                    ends = self.reach(room)
                    for first in starts:
                        reached[used | 1 << index] |= ends[first]
        if not reached[everything] >> layers & 1:
            return None
        order: list[int] = []
        used, end = everything, layers
        while used:
            index, first = next(
                (index, first)
                for index, room in enumerate(rooms)
                if used >> index & 1
                for first in _bits(reached[used & ~(1 << index)] & ~(1 << layers))
                if self.reach(room)[first] >> end & 1
            )
            order.append(index)
            used, end = used & ~(1 << index), first
        return tuple(reversed(order))

    def _likely_orders(self, rooms: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Orders by how little the two ends lose to embedding and output: only the ends matter for equal layers.

        Pairs of ends that could not do even if every other node took the best slice it could are left out.
        """
        layers, prefix = self.costs.layers, self.costs.prefix
        most = [self.most(room) for room in rooms]
        fronts, backs = [], []
        for index, room in enumerate(rooms):
            reach = self.reach(room)
            if ends := reach[0] & ~(1 << layers):
                fronts.append((most[index] - prefix[ends.bit_length() - 1], index))
            start = self._latest(room)
            if start < layers:
                backs.append((most[index] - prefix[-1] + prefix[start], index))
        spare = sum(most) - prefix[-1]
        pairs = sorted(
            (lost + further, first, last)
            for lost, first in sorted(fronts)[:_ENDS_TRIED]
            for further, last in sorted(backs)[:_ENDS_TRIED]
            if first != last and lost + further <= spare
        )
        for _, first, last in pairs:
            rest = [index for index in range(len(rooms)) if index not in (first, last)]
            yield (first, *rest, last)
            yield (first, *reversed(rest), last)


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
