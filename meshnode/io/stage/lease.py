"""How long a stage may still serve: judged by the stage itself, before every step.

Its node may be frozen, or just be woken from a machine's sleep, and know nothing yet; the coordinator has given the run
up meanwhile, and another may have claimed its lanes. The stage needs nobody to find that out.

Invariant: after its end no frame is answered until a later lease came.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Final


def _clock() -> Callable[[], float]:
    if sys.platform == "win32":
        return time.monotonic
    return partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


awake_and_asleep: Final = _clock()
"""Seconds of a clock that goes on while the machine sleeps: BOOTTIME of Linux, MONOTONIC of macOS (time.monotonic stops
there), GetTickCount64 of Windows, which is time.monotonic."""


class StageLease:
    """Written by the thread that hears the node, read by the one that computes: one float, so no lock."""

    def __init__(self, clock: Callable[[], float] = awake_and_asleep) -> None:
        self._clock = clock
        self._until = inf

    def renew(self, remaining_ms: int) -> None:
        """It ends so long from now."""
        self._until = self._clock() + remaining_ms / 1000

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._clock() >= self._until
