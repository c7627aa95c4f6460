"""`meshnode bench scan`: how late the event loop is while model files are read and hashed.

A hundred real files with a vocabulary of 32,000 tokens are opened at once, as a node opens them, in a loop that does
what a node's does. Before that the loop rests: what it is late then is the machine's doing.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import trio
from rich.console import Console

from meshnode.app.bench.model import write_model
from meshnode.app.pulse import SWITCH_S
from meshnode.app.shelf import Shelf
from meshnode.errors import ConfigError, Unavailable
from meshnode.identity.ids import NodeId
from meshnode.io.artifacts import BulkClient

BAR_MS: Final = 50.0
"""Issue 4: an answer waits no longer than that for a start."""
MOST_FILES: Final = 10_000
"""Five minutes."""
_VOCABULARY: Final = 32_000
_BEAT_S: Final = 0.01
"""Between two looks at the clock; a node's own pulse looks every 100 ms, and would miss most of it."""
_QUIET_S: Final = 3.0


@dataclass(frozen=True)
class ScanOptions:
    """What to measure."""

    files: int = 100

    def __post_init__(self) -> None:
        if not 1 <= self.files <= MOST_FILES:
            raise ConfigError(f"--files {self.files} is not between 1 and {MOST_FILES}")


class Lags(msgspec.Struct, frozen=True):
    """How late the loop was; milliseconds."""

    worst_ms: float
    usual_ms: float
    """Ninety-nine of a hundred were no later."""


class ScanReport(msgspec.Struct, frozen=True):
    """The object of `bench scan --json`."""

    files: int
    file_bytes: int
    seconds: float
    resting: Lags
    """The same loop, before."""
    scanning: Lags
    bar_ms: float
    within: bool


def run_scan(options: ScanOptions, progress: Callable[[str], None] = lambda _: None) -> ScanReport:
    """Measure. Raises ConfigError, OSError."""
    with tempfile.TemporaryDirectory(prefix="meshnode-bench-") as folder:
        progress("writing the model")
        first = Path(folder) / "model.gguf"
        write_model(1, 256, "q8_0", first, _VOCABULARY)
        paths = [first.with_name(f"model-{number}.gguf") for number in range(options.files)]
        for path in paths:  # another name is another file, and no disk is needed for it
            os.link(first, path)
        progress(f"opening {options.files} files")
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        try:
            return trio.run(_scan, paths, Path(folder) / "cache")
        finally:
            sys.setswitchinterval(before)


async def _scan(paths: list[Path], cache: Path) -> ScanReport:
    lags: list[float] = []
    shelf = Shelf(cache, _nobody, NodeId("bench"))

    async def beat() -> None:
        while True:
            due = trio.current_time() + _BEAT_S
            await trio.sleep_until(due)
            lags.append(trio.current_time() - due)

    async with trio.open_nursery() as beating:
        beating.start_soon(beat)
        await trio.sleep(_QUIET_S)
        resting = _lags(lags)
        lags.clear()
        begun = time.monotonic()
        async with trio.open_nursery() as nursery:
            for path in paths:
                nursery.start_soon(shelf.open, path, _ignore)
        seconds = time.monotonic() - begun
        beating.cancel_scope.cancel()
    shelf.close()
    scanning = _lags(lags)
    size = paths[0].stat().st_size
    within = scanning.worst_ms <= BAR_MS
    return ScanReport(len(paths), size, round(seconds, 2), resting, scanning, BAR_MS, within)


def _ignore(_done: int, _total: int) -> None:
    """Nobody watches."""


def _nobody(_node: NodeId) -> AbstractAsyncContextManager[BulkClient]:
    raise Unavailable("nothing is fetched here")


def _lags(lags: list[float]) -> Lags:
    ranked = sorted(lags) or [0.0]
    return Lags(round(ranked[-1] * 1000, 1), round(ranked[len(ranked) * 99 // 100] * 1000, 1))


def print_scan(report: ScanReport, console: Console) -> None:
    """The report for people."""
    mb = report.file_bytes / 1e6
    console.print(f"{report.files} files of {mb:.0f} MB read and hashed in {report.seconds:.1f} s")
    for name, lags in (("while it rested", report.resting), ("meanwhile", report.scanning)):
        console.print(
            f"the loop was late by {lags.worst_ms:.1f} ms at worst, 99 of 100 by {lags.usual_ms:.1f} ms, {name}"
        )
    console.print(f"bar: {report.bar_ms:g} ms{'' if report.within else ', which it missed'}")
