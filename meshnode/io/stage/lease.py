"""How long a stage may still serve: judged by the stage itself, before every step.

Its node may be frozen, or just be woken from a machine's sleep, and know nothing yet; the coordinator has given the run
up meanwhile, and another may have claimed its lanes. The stage needs nobody to find that out.

Invariant: after its end no frame is answered until a later lease came.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from math import inf


def awake_and_asleep() -> float:
    """Seconds of a clock that goes on while the machine sleeps: BOOTTIME of Linux, MONOTONIC of macOS (time.monotonic
    stops there), GetTickCount64 of Windows, which is time.monotonic."""
    if sys.platform == "win32":
        return time.monotonic()
    return time.clock_gettime(_CLOCK)


_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", 0))


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
