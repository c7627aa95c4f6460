"""The best cuts, and the best order of nodes, over a lattice of seats: exact for the whole sort key of a plan.

A seat is one node at one place of a pipeline; a path through seats is an order of nodes, and with an end for every
seat it is a placement. Among all placements the least of

    (time, slowest stage, stages, bytes to fetch, -memory of the nodes, node ids, ends)

is found key by key: each pass over the lattice keeps the steps that some placement takes which is best in all keys
before. A sum and a largest value do not make one dynamic programme; one after the other they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from meshnode.core.planning.context import Costs
from meshnode.core.planning.cuts import Cuts
from meshnode.core.planning.pace import NEVER, Matrix, Pace

Mask = npt.NDArray[np.bool_]
Weights = Callable[[int], Matrix]
"""Of the slices [first, last) of the node with this index."""

START = -1

_KEPT_CELLS = 4_000_000
"""Of matrices at once: 32 MB, or 400 nodes with a model of 100 layers; a petabyte of layers must not fill a machine."""

_ROOM_MAX = 1 << 62


@dataclass(frozen=True)
class Seat:
    """One node at one place of a pipeline."""

    node: int
    before: tuple[tuple[int, int], ...]
    """Seats that may come before (START: none), each with the ticks of the hop from it."""
    back: int
    """Ticks from here to the head; NEVER where a pipeline may not end here."""
    depth: int
    memory: int
    """Of all nodes up to here; equal for all ways to this seat, as the set of nodes is."""


@dataclass(frozen=True)
class Found:
    """A placement: node indices in pipeline order, where each slice ends, ticks a token."""

    order: tuple[int, ...]
    ends: tuple[int, ...]
    time: int


class Band:
    """Times of one node by length of slice: two narrow matrices instead of one that is mostly NEVER."""

    def __init__(self, times: Matrix) -> None:
        self.times = times
        lengths = np.flatnonzero([(times.diagonal(length) < NEVER).any() for length in range(len(times))])
        self._longest = longest = int(lengths[-1]) if len(lengths) else 0
        self._size = size = len(times)
        # [last, longest - length] and [first, length]: as the windows below see a vector of values
        self._by_last = np.full((size, longest + 1), NEVER, np.int64)
        self._by_first = np.full((size, longest + 1), NEVER, np.int64)
        for length in range(1, longest + 1):
            self._by_last[length:, longest - length] = times.diagonal(length)
            self._by_first[: size - length, length] = times.diagonal(length)
        self._beyond = np.full(longest, NEVER, np.int64)

    @property
    def cells(self) -> int:
        """What one use costs."""
        return self._by_last.size

    def onward(self, value: Matrix) -> Matrix:
        """Least times to have placed layers [0, b) with this node as the last, given those without it."""
        return self._through(np.concatenate((self._beyond, value)), self._by_last)

    def backward(self, value: Matrix) -> Matrix:
        """Least times for layers [b, all) with this node as the first, given those of the nodes after it."""
        return self._through(np.concatenate((value, self._beyond)), self._by_first)

    def _through(self, padded: Matrix, times: Matrix) -> Matrix:
        windows: Matrix = np.ndarray(times.shape, np.int64, padded, 0, (padded.itemsize, padded.itemsize))
        least: Matrix = np.minimum((windows + times).min(axis=1), NEVER)
        return least


class Slices:
    """Times and bytes to fetch of every slice that a node has room for, as matrices [first, last]."""

    def __init__(self, cuts: Cuts, costs: Costs, pace: Pace, missing: Sequence[Sequence[int]]) -> None:
        """`missing`: for each node the prefix sums of the bytes it lacks of each layer, then those it lacks of
        embedding, output and shared tensors."""
        self.pace = pace
        self.layers = layers = costs.layers
        prefix = np.array(costs.prefix, np.int64)
        self._need = prefix[None, :] - prefix[:, None] + costs.each
        self._need[0, :] += costs.embedding
        self._need[:, layers] += costs.output
        self._need[0, layers] -= costs.whole_saving
        allowed = np.zeros((layers + 1, layers + 1), np.bool_)
        for first, ends in enumerate(cuts.ends):
            allowed[first, list(ends)] = True
        self._need[~allowed] = _ROOM_MAX
        reads = np.array(pace.reads, np.int64)
        self._read = reads[None, :] - reads[:, None] + pace.shared
        self._read[:, layers] += pace.output
        self._count = np.arange(layers + 1)[None, :] - np.arange(layers + 1)[:, None]
        self._missing = missing
        self._times: dict[tuple[int, int, int, int], Matrix] = {}
        self._bands: dict[int, Band] = {}

    @property
    def cells(self) -> int:
        """Size of a matrix: what one step of any search costs."""
        return (self.layers + 1) ** 2

    def time(self, node: int) -> Matrix:
        """Ticks; NEVER where the slice is not allowed or does not fit."""
        room, tempo = self.pace.nodes[node].usable_bytes, self.pace.tempos[node]
        key = (room, tempo.byte, tempo.layer, tempo.step)
        known = self._times.get(key)
        if known is None:
            if len(self._times) * self.cells > _KEPT_CELLS:
                self._times.clear()
            fits = self._need <= min(room, _ROOM_MAX - 1)
            ticks = np.where(fits, self._read, 0) * tempo.byte + self._count * tempo.layer + tempo.step
            known = self._times[key] = np.where(fits, ticks, NEVER)
        return known

    def band(self, node: int) -> Band:
        """The same without the slices that are longer than the node has room for."""
        times = self.time(node)
        known = self._bands.get(id(times))
        if known is None or known.times is not times:
            if len(self._bands) * self.cells > _KEPT_CELLS:
                self._bands.clear()
            known = self._bands[id(times)] = Band(times)
        return known

    def fetch(self, node: int) -> Matrix:
        """Bytes that the node would have to fetch."""
        *prefix, embedding, output, shared = self._missing[node]
        layers = np.array(prefix, np.int64)
        bytes_ = layers[None, :] - layers[:, None] + shared
        bytes_[0, :] += embedding
        bytes_[:, self.layers] += output
        return bytes_


class Lattice:
    """Seats in an order in which `before` is always earlier."""

    def __init__(self, slices: Slices, seats: Sequence[Seat], ranks: Sequence[int]) -> None:
        """`ranks`: of each node index, the place of its id among all ids."""
        self._slices = slices
        self._seats = seats
        self._ranks = ranks
        size = slices.layers + 1
        self._doors: list[list[tuple[int, int, Mask | None]]] = [
            [(before, hop, None) for before, hop in seat.before] for seat in seats
        ]
        self._spans: list[Mask | None] = [None] * len(seats)
        self._alive: Sequence[int] = range(len(seats))
        self._values: list[Matrix] = []
        self._enters: list[Matrix] = []
        self._start = np.full(size, NEVER, np.int64)
        self._start[0] = 0
        self._nothing = np.full(size, NEVER, np.int64)

    def least_time(self) -> int:
        """Ticks of the fastest placement; NEVER or more: there is none."""
        self._forward(self._slices.time, np.add, hops=True)
        return min((self._end(j) + seat.back for j, seat in enumerate(self._seats)), default=NEVER)

    def best(self) -> Found | None:
        """The least placement by the whole key."""
        time = self.least_time()
        if time >= NEVER:
            return None
        finals = [j for j, seat in enumerate(self._seats) if self._end(j) + seat.back == time]
        self._narrow(self._slices.time, finals, hops=True)
        self._forward(self._slices.time, np.maximum, hops=False)
        slowest = min(self._end(j) for j in finals)
        for j in self._alive:
            span = self._spans[j]
            assert span is not None, "every seat that is left was narrowed"
            self._spans[j] = span & (self._slices.time(self._seats[j].node) <= slowest)
        self._forward(self._slices.fetch, np.add, hops=False)
        for key in (lambda j: self._seats[j].depth, self._end, lambda j: -self._seats[j].memory):
            finals = [j for j in finals if self._end(j) < NEVER]
            least = min(map(key, finals))
            finals = [j for j in finals if key(j) == least]
        self._narrow(self._slices.fetch, finals, hops=False)
        path = self._first_path()
        return Found(tuple(self._seats[j].node for j in path), self._first_ends(path), time)

    # --- passes -------------------------------------------------------------------------------------------------

    def _end(self, seat: int) -> int:
        return int(self._values[seat][self._slices.layers])

    def _value(self, seat: int) -> Matrix:
        return self._start if seat == START else self._values[seat]

    def _forward(self, weights: Weights, join: np.ufunc, *, hops: bool) -> None:
        """For each seat: the least value to have placed layers [0, b), for every b."""
        values = [self._nothing] * len(self._seats)
        enters = [self._nothing] * len(self._seats)
        self._values, self._enters = values, enters
        for j in self._alive:
            enter = self._nothing
            for before, hop, mask in self._doors[j]:
                source = self._value(before) + (hop if hops else 0)
                enter = np.minimum(enter, source if mask is None else np.where(mask, source, NEVER))
            enters[j] = enter
            if enter.min() >= NEVER:
                continue
            steps = join(enter[:, None], weights(self._seats[j].node))
            span = self._spans[j]
            if span is not None:
                steps = np.where(span, steps, NEVER)
            values[j] = np.minimum(steps.min(axis=0), NEVER)

    def _narrow(self, weights: Weights, finals: Sequence[int], *, hops: bool) -> None:
        """Keep the steps that a placement takes which is best by the sum that `_forward` just made."""
        size = self._slices.layers + 1
        alive = [np.zeros(size, np.bool_) for _ in self._seats]
        for j in finals:
            alive[j][self._slices.layers] = True
        for j in reversed(self._alive):
            if not alive[j].any():
                self._doors[j] = []
                continue
            tight = self._enters[j][:, None] + weights(self._seats[j].node) == self._values[j][None, :]
            tight &= alive[j][None, :] & (self._enters[j] < NEVER)[:, None]
            span = self._spans[j]
            self._spans[j] = span = tight if span is None else tight & span
            begins = span.any(axis=1)
            doors = []
            for before, hop, mask in self._doors[j]:
                through = begins & (self._value(before) + (hop if hops else 0) == self._enters[j])
                through = through if mask is None else through & mask
                if through.any():
                    doors.append((before, hop, through))
                    if before != START:
                        alive[before] |= through
            self._doors[j] = doors
        self._alive = [j for j in self._alive if self._doors[j]]

    # --- the last two keys --------------------------------------------------------------------------------------

    def _first_path(self) -> list[int]:
        """Seats of the least tuple of node ids. All ways that are left have the same number of seats."""
        path: list[int] = []
        at, places = START, self._start == 0
        while not places[self._slices.layers]:
            ways: list[tuple[int, int, Mask]] = []
            for j in self._alive:
                for before, _, mask in self._doors[j]:
                    if before == at and mask is not None and (mask & places).any():
                        ways.append((self._ranks[self._seats[j].node], j, mask & places))
            _, at, begins = min(ways, key=lambda way: way[0])
            span = self._spans[at]
            assert span is not None, "every seat that is left was narrowed"
            places = span[begins].any(axis=0)
            path.append(at)
        return path

    def _first_ends(self, path: Sequence[int]) -> tuple[int, ...]:
        """The least ends along one path."""
        spans: list[Mask] = []
        live = np.zeros(self._slices.layers + 1, np.bool_)
        live[self._slices.layers] = True
        for before, j in reversed(list(zip((START, *path[:-1]), path, strict=True))):
            span = self._spans[j]
            assert span is not None, "every seat that is left was narrowed"
            through = next(mask for source, _, mask in self._doors[j] if source == before)
            assert through is not None, "every door that is left was narrowed"
            spans.append(span & live[None, :] & through[:, None])
            live = np.asarray(spans[-1].any(axis=1))
        ends, first = [], 0
        for span in reversed(spans):
            first = int(span[first].argmax())
            ends.append(first)
        return tuple(ends)
