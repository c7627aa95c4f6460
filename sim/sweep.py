"""Many seeds: the profiles in turn, on as many cores as wanted; every failure with what repeats it."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from pathlib import Path

from sim.trial import Outcome, Setting, run

PROFILES = ("lan", "wan", "hostile")
SEEDS_FILE = Path(__file__).with_name("seeds.txt")


def settings(first: int, count: int, nodes: int, until: float) -> list[Setting]:
    """One for each seed; three seeds in a row see the three profiles."""
    return [Setting(seed, nodes, PROFILES[seed % len(PROFILES)], until) for seed in range(first, first + count)]


def failed_once() -> list[Setting]:
    """Every setting that ever broke a rule: `seed nodes profile until  # what it was`, one in a line."""
    lines = (line.partition("#")[0].split() for line in SEEDS_FILE.read_text(encoding="utf-8").splitlines())
    return [Setting(int(f[0]), int(f[1]), f[2], float(f[3])) for f in lines if f]


def sweep(wanted: list[Setting], jobs: int = 1) -> Iterator[Outcome]:
    """The outcome of each, in order."""
    if jobs == 1:
        yield from map(run, wanted)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _leave_interrupts_to_the_parent) as pool:
        yield from pool.imap(run, wanted, chunksize=8)


def _leave_interrupts_to_the_parent() -> None:
    """A terminal sends Ctrl-C to all processes: the parent says what there is, and ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
