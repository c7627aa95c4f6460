"""How late this node's event loop is: everything it answers waits so long.

Invariant: costs ten wake-ups a second, whatever happens, and remembers a minute.
"""

from __future__ import annotations

from collections import deque

import trio

BEAT_S = 0.1
"""Between two looks: a lag of 50 ms is seen, and the loop sleeps in between."""
BEATS = 600
"""A minute of them."""
LATE_S = 1.0
"""A beat as late as this is not this program's doing alone: the machine swaps, sleeps, or gives it no time."""

SWITCH_S = 0.001
"""A thread of Python that computes gives way to the loop after so long (the interpreter's own 5 ms, several times in a
row, are what an answer waits while headers of model files are parsed). With a hundred files on two busy cores the loop
was late by 8 to 36 ms at worst, and by 16 to 97 ms with the interpreter's own interval; 0.3 ms gained nothing more."""


class Pulse:
    """Beats while `run` runs."""

    def __init__(self) -> None:
        self._lags: deque[float] = deque(maxlen=BEATS)

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            due = trio.current_time() + BEAT_S
            await trio.sleep_until(due)
            self.beat(trio.current_time() - due)

    def beat(self, late_s: float) -> None:
        """The loop came so late."""
        self._lags.append(late_s)

    @property
    def worst_ms(self) -> int:
        """Of the last minute."""
        return round(max(self._lags, default=0.0) * 1000)

    @property
    def usual_ms(self) -> int:
        """Of 99 in 100 beats of the last minute."""
        ranked = sorted(self._lags)
        return round(ranked[len(ranked) * 99 // 100] * 1000) if ranked else 0

    @property
    def sick(self) -> str:
        """What is wrong, for people; empty: nothing."""
        late = sum(lag >= LATE_S for lag in self._lags)
        return f"it was {late} times more than {LATE_S:g} s late within a minute" if late > 2 else ""
