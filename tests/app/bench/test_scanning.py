"""`bench scan`: real files, and what is told of them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from meshnode.app.bench.scanning import BAR_MS, ScanOptions, _lags, print_scan, run_scan
from meshnode.errors import ConfigError


@pytest.mark.parametrize("files", [0, -1, 10_001])
def test_a_measurement_without_end_or_beginning_is_refused(files: int) -> None:
    with pytest.raises(ConfigError, match="--files"):
        ScanOptions(files)


def test_the_worst_and_the_usual_are_those_of_all_looks() -> None:
    found = _lags([number / 1000 for number in range(200)])
    assert (found.worst_ms, found.usual_ms) == (199.0, 198.0)
    assert _lags([]).worst_ms == 0.0


def test_every_file_is_read_and_the_bar_stands_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshnode.app.bench.scanning._QUIET_S", 0.1)
    report = run_scan(ScanOptions(files=3))
    assert report.files == 3
    assert report.file_bytes > 10_000_000
    assert report.seconds > 0
    assert report.within == (report.scanning.worst_ms <= BAR_MS)
    text = io.StringIO()
    print_scan(report, Console(file=text, width=120))
    assert "3 files" in text.getvalue()
    assert "bar: 50 ms" in text.getvalue()
