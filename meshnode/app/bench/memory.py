"""`meshnode bench memory`: what a stage takes beside its weights and its cache.

The planner promises a node's owner a number; this measures what the promise leaves out: interpreter, libraries,
compute buffers, repacked weights. Resident memory after 100 tokens, of every stage, by type and vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import psutil
import trio
from rich.console import Console
from rich.table import Table

from meshnode.app.bench.model import write_model
from meshnode.app.bench.rig import RigOptions, open_rig
from meshnode.errors import ConfigError

MOST_STAGES: Final = 16
"""Processes at once, as of `bench split`."""
ALLOWANCE: Final = 150_000_000
"""The bar: a stage's resident memory is at most its slice + its cache + this."""
_TOKENS: Final = 100


@dataclass(frozen=True)
class MemoryOptions:
    """What to measure: synthetic models of `layers` x `embd`, each type with each vocabulary."""

    layers: int = 24
    embd: int = 1024
    types: tuple[str, ...] = ("q8_0", "q4_k_m")
    vocabularies: tuple[int, ...] = (32_000, 150_000)
    stages: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.stages <= MOST_STAGES:
            raise ConfigError(f"--stages {self.stages} is not between 1 and {MOST_STAGES}")
        if 0 < self.layers < self.stages:
            raise ConfigError(f"{self.layers} layers do not make {self.stages} stages", f"--layers {self.stages}")


class StageMemory(msgspec.Struct, frozen=True):
    """One stage; bytes."""

    type: str
    vocabulary: int
    stage: int
    resident: int
    """RssAnon + RssFile of the process."""
    slice: int
    """Weights that were copied into the slice file: holes take nothing."""
    kv: int
    excess: int
    """resident - slice - kv."""
    within: bool
    """excess <= ALLOWANCE."""


class MemoryReport(msgspec.Struct, frozen=True):
    """The object of `bench memory --json`."""

    layers: int
    embd: int
    allowance: int
    stages: tuple[StageMemory, ...]
    within: bool


def run_memory(options: MemoryOptions, progress: Callable[[str], None] = lambda _: None) -> MemoryReport:
    """Measure. Raises ConfigError, ModelError, StageError, StageLost."""
    measured: list[StageMemory] = []
    for kind in options.types:
        for vocabulary in options.vocabularies:
            progress(f"{kind}, {vocabulary} tokens")
            with tempfile.TemporaryDirectory(prefix="meshnode-bench-") as folder:
                model = Path(folder) / "noise.gguf"
                write_model(options.layers, options.embd, kind, model, vocabulary)
                measured += trio.run(_measure, model, options.stages, kind, vocabulary)
    within = all(stage.within for stage in measured)
    return MemoryReport(options.layers, options.embd, ALLOWANCE, tuple(measured), within)


async def _measure(model: Path, stages: int, kind: str, vocabulary: int) -> list[StageMemory]:
    async with open_rig(model, RigOptions(stages=stages)) as rig:
        await rig.generate(range(1, 17), _TOKENS)
        found = []
        for number, (stage, loaded) in enumerate(zip(rig.stages, rig.loaded, strict=True)):
            resident = psutil.Process(stage.pid).memory_info().rss
            weights, kv = rig.sliced.weights[number], loaded.memory_bytes.get("kv", 0)
            excess = resident - weights - kv
            found.append(
                StageMemory(kind, vocabulary, number, resident, weights, kv, excess, within=excess <= ALLOWANCE)
            )
        return found


def print_memory(report: MemoryReport, console: Console) -> None:
    """The report for people; MB are 10^6 bytes."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("TYPE")
    for name in ("VOCABULARY", "STAGE", "RESIDENT MB", "SLICE", "KV", "REST", ""):
        table.add_column(name, justify="right")
    for item in report.stages:
        sizes = (f"{value / 1e6:.0f}" for value in (item.resident, item.slice, item.kv, item.excess))
        table.add_row(item.type, str(item.vocabulary), str(item.stage), *sizes, "" if item.within else "too much")
    console.print(table)
    verdict = "every stage takes" if report.within else "not every stage takes"
    console.print(f"{verdict} at most its slice + its cache + {report.allowance / 1e6:.0f} MB")
