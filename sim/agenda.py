"""Virtual time: one heap of what happens when, and the random streams that everything draws from."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random


class Agenda:
    """What is to happen, ordered by (time, sequence); seconds since the world began."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self._sequence = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, when: float, act: Callable[[], None]) -> None:
        """Do `act` at `when`, never earlier than now."""
        self._sequence += 1
        heapq.heappush(self._heap, (when if when > self.now else self.now, self._sequence, act))

    def after(self, delay: float, act: Callable[[], None]) -> None:
        """Do `act` in `delay` seconds."""
        self.at(self.now + delay, act)

    def run(self, until: float) -> None:
        """Everything that is due up to `until`, in order; then it is `until`."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until:
            self.now, _, act = pop(heap)
            self.steps += 1
            act()
        self.now = until


def stream(seed: int, *purpose: object) -> Random:
    """The random stream of one purpose: one more draw in it changes no other. Text seeds do not go through `hash()`."""
    return Random("/".join(map(str, (seed, *purpose))))  # noqa: S311 - a simulation must repeat
