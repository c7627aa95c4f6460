"""A good order of nodes where there are too many to look at all: start from some order and improve it step by step.

One move replaces a node, puts one in, takes one out, or swaps two neighbours; each is judged with the best cuts that it
allows, from the best times up to the place of the move and from there on. The work is counted in cells of matrices, not
timed: every machine makes the same moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from meshnode.core.planning.lattice import START, Seat, Slices
from meshnode.core.planning.pace import NEVER, Matrix

BUDGET_CELLS = 24_000_000
"""In all, for one start: 2,400 moves on a model of 100 layers, 50 ms on a 2-core machine."""

ROUNDS = 4
"""The budget allows at least so many rounds of moves: in a long pipeline fewer nodes are tried at each place."""

BARRED = 1 << 53
"""A hop that is not possible counts as nine seconds while moves are judged: the fewer there are, the better."""

Move = tuple[int, tuple[int, ...]]
"""(ticks, the order that it makes)."""


def chain(slices: Slices, order: Sequence[int]) -> list[Seat]:
    """The seats of one order of nodes: only the cuts are left to choose."""
    pace, seats, memory = slices.pace, [], 0
    for place, node in enumerate(order):
        memory += pace.nodes[node].usable_bytes
        before = (place - 1, pace.hop(order[place - 1], node)) if place else (START, pace.enter(node))
        back = pace.back(node, order[0]) if place == len(order) - 1 else NEVER
        seats.append(Seat(node, (before,), back, place + 1, memory))
    return seats


def improved(slices: Slices, order: Sequence[int], candidates: Sequence[int], most: int) -> tuple[int, ...]:
    """The order after moves that make a token faster, as long as there are any and the budget lasts.

    `candidates`: nodes to try, the most promising first. `most`: no more stages than this.
    """
    return _Climb(slices, candidates, most).run(tuple(order))


class _Climb:
    def __init__(self, slices: Slices, candidates: Sequence[int], most: int) -> None:
        self._slices = slices
        self._pace = slices.pace
        self._candidates = candidates
        self._most = most
        self._left = BUDGET_CELLS // slices.cells

    def run(self, order: tuple[int, ...]) -> tuple[int, ...]:
        """One best move after the other."""
        time: int | None = None
        tried = max(2, self._left // (ROUNDS * (2 * len(order) + 1)))
        while self._left > 0:
            now, moves = self._moves(order, self._candidates[:tried])
            time = now if time is None else time
            best = min(moves, default=None)
            if best is None or best[0] >= time:
                break
            time, order = best
        return order

    def _moves(self, order: tuple[int, ...], candidates: Sequence[int]) -> tuple[int, Iterator[Move]]:
        heads, tails = self._heads(order), self._tails(order)
        now = int((heads[-1] + tails[-1]).min()) + self._back(order)
        return now, self._each(order, heads, tails, [node for node in candidates if node not in order])

    def _each(
        self, order: tuple[int, ...], heads: list[Matrix], tails: list[Matrix], others: Sequence[int]
    ) -> Iterator[Move]:
        count = len(order)
        for place in range(count + 1):
            before, after = order[:place], order[place:]
            if count < self._most:
                for node in others:
                    yield self._with(before, (node,), after, (heads[place], tails[place]))
            if place == count:
                return
            if count > 1:
                yield self._with(before, (), after[1:], (heads[place], tails[place + 1]))
            for node in others:
                yield self._with(before, (node,), after[1:], (heads[place], tails[place + 1]))
            if place + 1 < count:
                swapped = (order[place + 1], order[place])
                yield self._with(before, swapped, order[place + 2 :], (heads[place], tails[place + 2]))

    def _with(
        self, before: tuple[int, ...], middle: tuple[int, ...], after: tuple[int, ...], ends: tuple[Matrix, Matrix]
    ) -> Move:
        """`before`, `middle`, `after` in a row; `ends`: best times up to the end of `before`, and from `after` on."""
        value, tail = ends
        last = before[-1] if before else None
        for node in middle:
            value = self._through(value + self._hop(last, node), node)
            last = node
        if after:
            value = value + self._hop(last, after[0])
        order = before + middle + after
        return int((value + tail).min()) + self._back(order), order

    def _hop(self, source: int | None, target: int) -> int:
        return min(BARRED, self._pace.enter(target) if source is None else self._pace.hop(source, target))

    def _back(self, order: tuple[int, ...]) -> int:
        return min(BARRED, self._pace.back(order[-1], order[0]))

    def _through(self, value: Matrix, node: int) -> Matrix:
        self._left -= 1
        through: Matrix = np.minimum((value[:, None] + self._slices.time(node)).min(axis=0), NEVER)
        return through

    def _heads(self, order: tuple[int, ...]) -> list[Matrix]:
        """Best times to have placed layers [0, b) on the first k nodes, for k = 0, 1, ..."""
        start = np.full(self._slices.layers + 1, NEVER, np.int64)
        start[0] = 0
        heads = [start]
        for place, node in enumerate(order):
            heads.append(self._through(heads[-1] + self._hop(order[place - 1] if place else None, node), node))
        return heads

    def _tails(self, order: tuple[int, ...]) -> list[Matrix]:
        """Best times for layers [b, all) on the nodes from the k-th on, without the hop to it and the way back."""
        end = np.full(self._slices.layers + 1, NEVER, np.int64)
        end[self._slices.layers] = 0
        tails = [end]
        for place in reversed(range(len(order))):
            after = tails[-1]
            if place + 1 < len(order):
                after = after + self._hop(order[place], order[place + 1])
            self._left -= 1
            tails.append(np.minimum((self._slices.time(order[place]) + after[None, :]).min(axis=1), NEVER))
        return tails[::-1]
