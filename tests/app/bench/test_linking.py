"""Two processes over real TLS, with few bytes: what comes out is complete, whatever the machine is worth."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from meshnode.app.bench.linking import BARS, LinkOptions, LinkReport, print_link, run_link
from meshnode.errors import ConfigError


def test_a_measurement_of_two_processes_gives_every_figure_and_its_bar() -> None:
    heard: list[str] = []

    report = run_link(LinkOptions(trips=100, megabytes=2, rounds=2), heard.append)

    assert heard == ["round 1 of 2", "round 2 of 2"]
    assert 0 < report.median_us <= report.p99_us
    assert report.mb_per_s > 0
    assert msgspec.json.decode(msgspec.json.encode(report), type=LinkReport) == report
    written = io.StringIO()
    print_link(report, Console(file=written, width=100))
    assert all(f"{bar:.0f} " in written.getvalue() for bar in BARS.values())


def test_a_measurement_that_would_say_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="100 to"):
        LinkOptions(trips=1)
