"""`bench join`: what it tells of its rounds, and one round of real processes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from meshnode.app.bench.joining import BARS, JoinOptions, print_join, run_join
from meshnode.errors import ConfigError


@pytest.mark.parametrize("rounds", [0, -1, 101])
def test_a_measurement_without_end_or_beginning_is_refused(rounds: int) -> None:
    with pytest.raises(ConfigError, match="--rounds"):
        JoinOptions(rounds)


@pytest.mark.e2e
@pytest.mark.native
def test_a_round_measures_every_wait_and_prints_the_bars_beside() -> None:
    report = run_join(JoinOptions(rounds=1))
    waits = {wait.name: wait for wait in report.waits}
    assert {name: wait.bar_s for name, wait in waits.items() if wait.bar_s is not None} == BARS
    for wait in report.waits:
        assert 0 < wait.median_s == wait.worst_s == wait.seconds[0]
        assert wait.within == (wait.bar_s is None or wait.worst_s <= wait.bar_s)
    assert waits["joined"].worst_s <= waits["answering"].worst_s
    text = io.StringIO()
    print_join(report, Console(file=text, width=120))
    assert "found by mDNS alone" in text.getvalue()
