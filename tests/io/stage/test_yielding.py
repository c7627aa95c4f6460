"""Work beside what serves has a lower priority, and nothing after it has."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from meshnode.io.stage.yielding import NICENESS, aside

by_thread = pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are known on Linux only")


def own_niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


@by_thread
def test_a_job_gives_way_with_the_threads_it_starts_and_whoever_waits_for_it_does_not() -> None:
    before = own_niceness()
    seen: list[int] = []

    def job() -> None:
        seen.append(own_niceness())
        inner = threading.Thread(target=lambda: seen.append(own_niceness()))
        inner.start()
        inner.join()

    aside(job)
    expected = min(before + NICENESS, 19)
    assert seen == [expected, expected]
    assert own_niceness() == before


def test_what_a_job_raises_is_raised_to_who_waits() -> None:
    def job() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        aside(job)
