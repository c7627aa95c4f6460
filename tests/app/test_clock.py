import trio

from meshnode.app import clock as module
from meshnode.app.clock import WakefulClock
from meshnode.io.stage.lease import awake_and_asleep


def test_an_event_loop_runs_on_it() -> None:
    async def wait() -> tuple[float, float]:
        before = trio.current_time()
        with trio.move_on_after(0.01):
            await trio.Event().wait()
        return before, trio.current_time()

    before, after = trio.run(wait, clock=WakefulClock())
    assert after >= before + 0.01
    assert awake_and_asleep() >= after


def test_a_deadline_is_counted_through_a_sleep_of_the_machine(monkeypatch) -> None:
    clock = WakefulClock()
    monkeypatch.setattr(module, "awake_and_asleep", lambda: 1000.0)
    assert clock.deadline_to_sleep_time(1015.0) == 15.0
    monkeypatch.setattr(module, "awake_and_asleep", lambda: 4600.0)
    assert clock.current_time() == 4600.0
    assert clock.deadline_to_sleep_time(1015.0) < 0
