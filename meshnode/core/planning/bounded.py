"""A good order of nodes where there are too many to look at all: start from some order and improve it step by step.

One move puts a node in, takes one out, replaces one, or changes the order of a few neighbours. A sweep goes along the
pipeline and makes the best move at every place at once; each is judged with the best cuts that it allows, from the best
times up to the place and from there on. The work is counted in cells of matrices, not timed: every machine makes the
same moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from meshnode.core.planning.lattice import START, Seat, Slices
from meshnode.core.planning.pace import NEVER, Matrix

BUDGET_CELLS = 24_000_000
"""For all starts of one plan: 60 ms on a 2-core machine, and on average within 2 % of what ten times as much finds.
Every move counts as its cells and CELLS_A_MOVE."""

CELLS_A_MOVE = 5_000
"""What a move costs whatever the size of its matrix: the calls."""

SWEEPS = 3
"""The budget allows so many at least: in a long pipeline fewer nodes are tried at each place."""

WINDOW = 5
"""Neighbours among which one is moved or all are turned round: what links that differ call for."""

BARRED = 1 << 53
"""A hop that is not possible counts as nine seconds while moves are judged: the fewer there are, the better."""

Order = tuple[int, ...]


def chain(slices: Slices, order: Sequence[int]) -> list[Seat]:
    """The seats of one order of nodes: only the cuts are left to choose."""
    pace, seats, memory = slices.pace, [], 0
    for place, node in enumerate(order):
        memory += pace.nodes[node].usable_bytes
        before = (place - 1, pace.hop(order[place - 1], node)) if place else (START, pace.enter(node))
        back = pace.back(node, order[0]) if place == len(order) - 1 else NEVER
        seats.append(Seat(node, (before,), back, place + 1, memory))
    return seats


def improved(slices: Slices, order: Sequence[int], candidates: Sequence[int], bounds: tuple[int, int]) -> Order:
    """The order after moves that make a token faster, as long as there are any and the budget lasts.

    `candidates`: nodes to try, the most promising first. `bounds`: the most stages, and the budget in cells.
    """
    return _Climb(slices, candidates, bounds).run(tuple(order))


class _Climb:
    def __init__(self, slices: Slices, candidates: Sequence[int], bounds: tuple[int, int]) -> None:
        self._slices = slices
        self._pace = slices.pace
        self._candidates = candidates
        self._most, self._budget = bounds
        self._left = self._budget
        self._nothing = np.full(slices.layers + 1, NEVER, np.int64)

    def run(self, order: Order) -> Order:
        """Sweep after sweep, until one changes nothing."""
        swept: Order = ()
        while swept != order and self._left > 0:
            swept, order = order, self._sweep(order)
        return order

    def _sweep(self, order: Order) -> Order:
        tails = self._tails(order)
        head = self._nothing.copy()
        head[0] = 0
        tried = self._candidates[: self._width(order)]
        time = int((head + self._hop(None, order[0]) + tails[-1]).min()) + self._back(order)
        place = 0
        while place <= len(order) and self._left > 0:
            others = [node for node in tried if node not in order]
            best = min(self._moves(order, place, (head, tails), others), default=None)
            if best is not None and best[0] < time:
                before, (time, order) = order, best
                if set(before) == set(order):
                    tails = self._tails(order)  # the nodes behind this place stand in another order now
                if len(order) < len(before):
                    continue
            if place < len(order):
                head = self._through(head + self._hop(order[place - 1] if place else None, order[place]), order[place])
            place += 1
        return order

    def _width(self, order: Order) -> int:
        """How many nodes can be tried at each place, twice, in one of the sweeps."""
        cells = sum(self._slices.band(node).cells + CELLS_A_MOVE for node in order) // len(order)
        return max(2, self._budget // SWEEPS // (2 * (len(order) + 1) * cells))

    def _moves(
        self, order: Order, place: int, times: tuple[Matrix, list[Matrix]], others: Sequence[int]
    ) -> Iterator[tuple[int, Order]]:
        """(ticks, the order it makes) of each move at `place`; `times`: the best up to there, and of the last k."""
        before, after = order[:place], order[place:]
        if len(order) < self._most:
            for node in others:
                yield self._made(times, before, (node,), after)
        if not after:
            return
        if len(order) > 1:
            yield self._made(times, before, (), after[1:])
        for node in others:
            yield self._made(times, before, (node,), after[1:])
        for width in range(2, min(len(after), WINDOW) + 1):
            part, rest = after[:width], after[width:]
            for middle in dict.fromkeys(((*part[1:], part[0]), (part[-1], *part[:-1]), part[::-1])):
                yield self._made(times, before, middle, rest)

    def _made(
        self, times: tuple[Matrix, list[Matrix]], before: Order, middle: Order, after: Order
    ) -> tuple[int, Order]:
        value, tails = times
        last = before[-1] if before else None
        for node in middle:
            value = self._through(value + self._hop(last, node), node)
            last = node
        if after:
            value = value + self._hop(last, after[0])
        order = before + middle + after
        return int((value + tails[len(after)]).min()) + self._back(order), order

    def _hop(self, source: int | None, target: int) -> int:
        return min(BARRED, self._pace.enter(target) if source is None else self._pace.hop(source, target))

    def _back(self, order: Order) -> int:
        return min(BARRED, self._pace.back(order[-1], order[0]))

    def _through(self, value: Matrix, node: int) -> Matrix:
        band = self._slices.band(node)
        self._left -= band.cells + CELLS_A_MOVE
        return band.onward(value)

    def _tails(self, order: Order) -> list[Matrix]:
        """Best times for layers [b, all) on the last k nodes, without the hop to them and the way back."""
        end = self._nothing.copy()
        end[self._slices.layers] = 0
        tails, following = [end], None
        for node in reversed(order):
            after = tails[-1] if following is None else tails[-1] + self._hop(node, following)
            band = self._slices.band(node)
            self._left -= band.cells + CELLS_A_MOVE
            tails.append(band.backward(after))
            following = node
        return tails
