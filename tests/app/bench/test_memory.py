from __future__ import annotations

import io

import pytest
from rich.console import Console

from meshnode.app.bench.memory import MemoryOptions, print_memory, run_memory
from meshnode.errors import ConfigError


@pytest.mark.parametrize(("layers", "stages"), [(24, 0), (24, 17), (3, 4)])
def test_more_stages_than_there_can_be_and_none_are_refused_before_anything_is_written(
    layers: int, stages: int
) -> None:
    with pytest.raises(ConfigError, match="stages"):
        MemoryOptions(layers=layers, stages=stages)


@pytest.mark.native
def test_memory_of_every_stage_is_its_slice_its_cache_and_a_bounded_rest() -> None:
    report = run_memory(MemoryOptions(layers=2, embd=256, types=("q8_0",), vocabularies=(600,)))
    assert [stage.stage for stage in report.stages] == [0, 1]
    for stage in report.stages:
        assert stage.resident == stage.slice + stage.kv + stage.excess
        assert stage.kv > 0
        assert stage.slice > 256 * 256
    assert report.within, "a stage of a tiny model is nearly all rest"
    text = io.StringIO()
    print_memory(report, Console(file=text, width=80))
    assert "every stage takes at most" in text.getvalue()
