"""Whole worlds: short seeds in the test command, long sweeps by `python -m sim sweep`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sim import commands, sweep, trial
from sim.trial import Outcome, Setting, run

ROOT = Path(__file__).parents[2]
SHORT_SEEDS, SHORT_S, NODES = 300, 30.0, 5


def report_of(broken: list[Outcome]) -> str:
    return "\n".join(commands.told(outcome) for outcome in broken)


def test_no_rule_is_broken_in_three_hundred_short_worlds() -> None:
    outcomes = list(sweep.sweep(sweep.settings(0, SHORT_SEEDS, NODES, SHORT_S)))

    assert [outcome for outcome in outcomes if not outcome.good] == [], report_of([o for o in outcomes if not o.good])
    assert sum(outcome.applied for outcome in outcomes) > 10 * SHORT_SEEDS
    assert sum(outcome.lies for outcome in outcomes) > SHORT_SEEDS


def test_every_seed_that_ever_failed_passes_now() -> None:
    outcomes = list(sweep.sweep(sweep.failed_once()))

    assert outcomes
    assert [outcome for outcome in outcomes if not outcome.good] == [], report_of([o for o in outcomes if not o.good])


def test_a_world_of_all_faults_serves_again_after_the_heal() -> None:
    for seed in range(3):
        outcome = run(Setting(seed, NODES, "hostile", 120.0))
        assert outcome.good, commands.told(outcome)


def test_more_plans_than_a_mesh_needs_are_found_over_a_run_and_after_it_has_come_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = Setting(1, NODES, "lan", 120.0)
    monkeypatch.setattr(trial, "QUIET_PLANS", -1)
    assert "after all was served" in run(world).detail
    monkeypatch.setattr(trial, "PLANS_PER_S", 0.0)
    assert "node-seconds" in run(world).detail


PRINT_TRACES = """
from sim.sweep import settings
from sim.trial import run
for setting in settings(1000, 20, 5, 20.0):
    print(run(setting).trace)
"""


def traces(hash_seed: str) -> list[str]:
    surroundings = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_TRACES], cwd=ROOT, env=surroundings, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_two_processes_with_different_hash_seeds_see_the_same_twenty_worlds() -> None:
    one, two = traces("1"), traces("2")

    assert len(set(one)) == 20
    assert one == two


def test_a_failure_names_what_repeats_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(trial, "CONVERGE_S", 0.0)
    monkeypatch.setattr(trial, "populate", lambda world, nodes: [world.add(f"n{i}").start() for i in range(nodes)])

    assert commands.main(["--seed", "4", "--nodes", "2", "--profile", "lan", "--until", "20"]) == 1

    told = capsys.readouterr().out
    assert "BROKEN: rosters differ at 8.000000 s" in told
    assert "python -m sim --seed 4 --nodes 2 --profile lan --until 20" in told
    assert "n0 does not know n1" in told


def test_a_sweep_counts_what_it_ran(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "failed_once", list)

    assert commands.main(["sweep", "--seeds", "3", "--until", "5", "--nodes", "2"]) == 0

    assert "3 runs, 0 broken, 30 node-seconds" in capsys.readouterr().out


def test_a_sweep_that_is_stopped_says_where_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(wanted: list[Setting], jobs: int) -> Iterator[Outcome]:
        yield from map(run, wanted[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "failed_once", lambda: [Setting(9, 2, "lan", 3.0)])
    monkeypatch.setattr(sweep, "sweep", interrupted)
    monkeypatch.setattr(commands, "PROGRESS_S", 0.0)

    assert commands.main(["sweep", "--first", "40", "--seeds", "10", "--until", "3", "--nodes", "2"]) == 1

    told = capsys.readouterr()
    assert "3 runs, 0 broken, 18 node-seconds" in told.out
    assert "go on with --first 42 --seeds 8" in told.out
    assert "8 to go" in told.err
