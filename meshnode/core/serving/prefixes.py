"""Which lane a request gets, and how much of its prompt the lanes hold already. Pure.

A lane whose request ended keeps its rows until its place is needed. A new request takes the lane with the longest
common prefix, or copies it to another lane, and computes only what is missing, one row at least.

Invariants: what is counted as held was answered by the last stage, so every stage holds it; rows of one owner are never
used for another; cells of kept and of held lanes add up to at most the room's, copied rows counted in each lane.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Final, NamedTuple

from meshnode.core.serving.room import Room
from meshnode.wire.activation import AnyOperation, Close, Copy, Trim

WORTH: Final = 4
"""Rows. Every chat of a model begins alike, with its first token and the mark of a turn; that is not worth a lane."""
NOWHERE: Final = -1


class Reuse(Enum):
    """What a run's memory lets be used again."""

    NONE = "none"
    WHOLE = "whole"
    """Recurrent state cannot be cut back: a lane is used when all it holds begins the new prompt, or not at all."""
    ANY = "any"


class Kept(NamedTuple):
    """A lane without a request: `ids` are the positions it holds on every stage."""

    lane: int
    ids: list[int]
    owner: str
    exact: int = 0
    """Of these: computed in the chunks in which any prompt that begins with them is computed."""


class Seat(NamedTuple):
    """A lane for a request. `operations` are to be done before its Open, which keeps the first `rows` positions."""

    lane: int
    rows: int = 0
    operations: tuple[AnyOperation, ...] = ()
    exact: int = 0
    """Of these rows, as of `Kept`."""


class Prefixes:
    """The lanes that nobody holds any more, least recently used first, beside the room that counts their cells."""

    def __init__(self, room: Room, reuse: Reuse) -> None:
        self._room = room
        self.reuse = reuse
        self._kept: dict[int, Kept] = {}
        self.cells = 0
        """Of all kept lanes."""

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, lane: int) -> bool:
        return lane in self._kept

    def keep(self, kept: Kept, sent: int) -> tuple[AnyOperation, ...]:
        """Take a held lane whose request ended after `sent` rows, of which `kept.ids` are answered; or free it."""
        held = len(kept.ids)
        cut = held < sent
        if held < WORTH or self.reuse is Reuse.NONE or (cut and self.reuse is Reuse.WHOLE):
            self._room.give_back(kept.lane)
            return (Close(kept.lane),)
        self._room.resize(kept.lane, held)
        self._kept[kept.lane] = kept
        self.cells += held
        return (Trim(kept.lane, held),) if cut else ()

    def drop(self, lane: int) -> tuple[AnyOperation, ...]:
        """Free a kept lane."""
        self.cells -= len(self._kept.pop(lane).ids)
        self._room.give_back(lane)
        return (Close(lane),)

    def drop_oldest(self) -> tuple[AnyOperation, ...]:
        """Free the lane that was not used for longest; nothing when none is kept."""
        return self.drop(next(iter(self._kept))) if self._kept else ()

    def drop_all(self) -> tuple[AnyOperation, ...]:
        """Free every kept lane."""
        return tuple(operation for lane in list(self._kept) for operation in self.drop(lane))

    def seat(self, ids: list[int], owner: str | None, cells: int, live: Iterable[Kept] = (), grain: int = 0) -> Seat:
        """Reserve `cells` on a lane for a request that begins with `ids`; None as owner: it begins with nothing.

        `live`: lanes with requests of the same owner and what of them is answered. `grain`: it begins with exact rows
        only, so many or a multiple. The caller looked: with all kept lanes dropped there would be a lane and the cells.
        """
        source, rows, exact = (NOWHERE, 0, 0) if owner is None else self._longest(ids, owner, live, grain)
        if source in self._kept and self._takes(source, rows, cells):
            return self._take(source, rows, cells)._replace(exact=exact)
        if source in self._kept:
            self._kept[source] = self._kept.pop(source)  # used now
        operations = () if self._room.free_lanes else self._drop_oldest_but(source)
        while self._room.free_cells < cells:
            operations += self._drop_oldest_but(source)
        lane = self._room.take(cells)
        return Seat(lane, rows, (*operations, Copy(source, lane, rows)) if rows else operations, exact)

    def _longest(self, ids: list[int], owner: str, live: Iterable[Kept], grain: int) -> tuple[int, int, int]:
        """The lane with the most rows for `ids`, how many, and how many exact; of equals the one used last, kept before
        live."""
        best, most, exact = NOWHERE, WORTH - 1, 0
        candidates = [kept for kept in self._kept.values() if kept.owner == owner]
        for kept in (*reversed(candidates), *(live if self.reuse is Reuse.ANY else ())):
            rows = min(shared(kept.ids, ids), len(ids) - 1)
            if grain:
                rows = min(rows, kept.exact) // grain * grain
            whole = rows == len(kept.ids)
            if rows > most and (whole or self.reuse is Reuse.ANY):
                best, most, exact = kept.lane, rows, min(kept.exact, rows)
        return (best, most, exact) if best != NOWHERE else (NOWHERE, 0, 0)

    def _takes(self, source: int, rows: int, cells: int) -> bool:
        """Whether to cut the kept lane `source` rather than copy its beginning and leave it."""
        held = len(self._kept[source].ids)
        if rows == held:
            return True
        if self._room.free_lanes:
            return self._room.free_cells < cells
        # Without an empty lane a copy costs the oldest one; what is cut off here may be less.
        oldest = next(iter(self._kept.values()))
        return oldest.lane == source or held <= 2 * rows or self._room.free_cells + len(oldest.ids) < cells

    def _take(self, lane: int, rows: int, cells: int) -> Seat:
        held = len(self._kept.pop(lane).ids)
        self.cells -= held
        operations: tuple[AnyOperation, ...] = ()
        while self._room.free_cells + held < cells:
            operations += self.drop_oldest()
        self._room.resize(lane, cells)
        return Seat(lane, rows, (*operations, Trim(lane, rows)) if rows < held else operations)

    def _drop_oldest_but(self, source: int) -> tuple[AnyOperation, ...]:
        return self.drop(next(lane for lane in self._kept if lane != source))


def shared(first: list[int], second: list[int]) -> int:
    """How many ids both begin with. Slices are compared in C: 30,000 equal ids take 1.6 ms, a loop of Python 5.7 ms."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:
        return most
    alike = 0
    while most - alike > 1:
        middle = (alike + most) // 2
        if first[alike:middle] == second[alike:middle]:
            alike = middle
        else:
            most = middle
    return alike
