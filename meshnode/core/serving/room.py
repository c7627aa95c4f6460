"""Cells and lanes: who holds what.

Invariant: every lane is free or held once, by a seating or for what it holds of an ended one; the reservations of all
add up to at most `context`.
"""

from __future__ import annotations


class Room:
    """The ledger of one run's KV cache (cells) and its lanes. Permits are taken and given back exactly once."""

    def __init__(self, context: int, lanes: int) -> None:
        self.context = context
        self._free_lanes = list(range(lanes - 1, -1, -1))
        self._held: dict[int, int] = {}
        self._free_cells = context

    @property
    def free_cells(self) -> int:
        """Cells that nobody reserved."""
        return self._free_cells

    @property
    def free_lanes(self) -> int:
        """Lanes that nobody holds."""
        return len(self._free_lanes)

    def take(self, cells: int) -> int:
        """Take a lane with `cells` reserved. The caller looked: a lane and the cells are free."""
        assert 0 < cells <= self._free_cells
        lane = self._free_lanes.pop()
        self._held[lane] = cells
        self._free_cells -= cells
        return lane

    def grow(self, lane: int, cells: int) -> int:
        """Reserve up to `cells` more for a held lane; how many it got (0: none is free)."""
        more = min(cells, self._free_cells)
        self._held[lane] += more
        self._free_cells -= more
        return more

    def resize(self, lane: int, cells: int) -> None:
        """Reserve exactly `cells` for a held lane. The caller looked: those that it has not are free."""
        self._free_cells += self._held[lane] - cells
        self._held[lane] = cells
        assert cells > 0 <= self._free_cells

    def give_back(self, lane: int) -> None:
        """Free a held lane and its cells."""
        self._free_cells += self._held.pop(lane)
        self._free_lanes.append(lane)
