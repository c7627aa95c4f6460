"""The clock of a node's event loop: one that goes on while the machine sleeps.

trio's own stops then: a laptop that was shut for an hour would take every lease, deadline and certificate check for an
hour younger. The loop itself wakes up late after a sleep, within `runtime.LONGEST_SLEEP_S`.
"""

from __future__ import annotations

import trio

from meshnode.io.stage.lease import awake_and_asleep


class WakefulClock(trio.abc.Clock):
    """For `trio.run`."""

    def start_clock(self) -> None:
        """It runs already."""

    def current_time(self) -> float:
        """Seconds since some moment in the past."""
        return awake_and_asleep()

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Seconds from now."""
        return deadline - awake_and_asleep()
