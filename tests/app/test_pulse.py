from __future__ import annotations

import trio
from trio.testing import MockClock

from meshnode.app.pulse import BEAT_S, BEATS, LATE_S, Pulse


async def test_a_loop_that_is_held_up_is_seen(autojump_clock: MockClock) -> None:
    pulse = Pulse()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pulse.run)
        await trio.sleep(10 * BEAT_S + BEAT_S / 2)
        assert (pulse.worst_ms, pulse.usual_ms, pulse.sick) == (0, 0, "")
        autojump_clock.jump(3.0)  # as if something had computed for so long
        await trio.sleep(BEAT_S)
        assert pulse.worst_ms >= 2900
        nursery.cancel_scope.cancel()


def test_being_late_now_and_then_is_no_sickness_and_is_forgotten_after_a_minute() -> None:
    pulse = Pulse()
    for _ in range(2):
        pulse.beat(LATE_S)
    assert pulse.sick == ""
    pulse.beat(LATE_S)
    assert "3 times" in pulse.sick
    for _ in range(BEATS):
        pulse.beat(0.0)
    assert (pulse.worst_ms, pulse.sick) == (0, "")
