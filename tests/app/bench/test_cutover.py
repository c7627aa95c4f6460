"""`bench cutover`: which pauses it counts where, and one hand-over of real processes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from meshnode.app.bench import cutover
from meshnode.app.bench.cutover import CutoverOptions, Moments, _pauses, _report, print_cutover, run_cutover
from meshnode.demo import MODEL
from meshnode.errors import ConfigError, ModelError


@pytest.mark.parametrize("options", [{"streams": 0}, {"streams": 5}, {"threads": 0}, {"threads": 257}])
def test_a_measurement_that_cannot_be_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        CutoverOptions(**options)


@pytest.mark.parametrize("content", [None, b"no GGUF"])
def test_what_is_no_model_is_said_before_a_node_is_started(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.gguf"):
        run_cutover(CutoverOptions(model=path), progress=pytest.fail)


def test_a_pause_that_begins_or_ends_within_the_hand_over_belongs_to_it() -> None:
    even = [(at / 100, 0.01) for at in range(100)]
    before, across, within, after = (1.5, 0.03), (2.05, 0.1), (2.5, 0.2), (3.5, 0.04)
    found = _pauses([*even, before, across, within, after], Moments(drained=2.0, serving=3.0, gone=4.0))
    assert (found.tokens, found.median_ms, found.control_ms) == (104, 10.0, 0.0)
    assert (found.outside_ms, found.outside_ratio) == (40.0, 4.0)
    assert (found.during_ms, found.during_ratio) == (200.0, 20.0)


def test_pauses_after_the_former_run_is_gone_are_the_control() -> None:
    gaps = [(1.0, 0.01), (1.5, 0.01), (4.01, 0.02), (4.5, 0.05), (4.6, 0.01)]
    found = _pauses(gaps, Moments(drained=2.0, serving=3.0, gone=4.0))
    assert (found.control_ms, found.control_ratio) == (50.0, 5.0)
    assert (found.outside_ms, found.during_ms) == (20.0, 0.0)


def test_nothing_that_streamed_is_not_within_the_bar() -> None:
    assert _pauses([], Moments(1.0, 2.0, 3.0)).tokens == 0

    class Silent:
        errors: tuple[str, ...] = ()
        finished = 0
        gaps: tuple[tuple[float, float], ...] = ()

    assert not _report([Silent()], Moments(1.0, 2.0, 3.0)).within  # type: ignore[list-item]


@pytest.mark.e2e
@pytest.mark.native
def test_a_hand_over_ends_no_stream_and_is_told_with_its_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutover, "_QUIET_S", 0.5)
    report = run_cutover(CutoverOptions(model=MODEL, streams=2))
    assert report.errors == ()
    assert len(report.streams) == 2
    assert report.finished >= 2
    assert 0 < report.serving_s < report.gone_s
    for stream in report.streams:
        assert stream.tokens > 500
        assert 0 < stream.median_ms <= stream.usual_ms
        assert stream.during_ms > 0
        assert stream.control_ms > 0
    text = io.StringIO()
    print_cutover(report, Console(file=text, width=140))
    assert "0 errors" in text.getvalue()
