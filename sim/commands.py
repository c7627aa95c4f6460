"""The command line of the simulator."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from sim import report
from sim import sweep as sweeping
from sim.profiles import PROFILES
from sim.trial import Outcome, Setting, run

PROGRESS_S = 30.0
"""Between two lines of progress of a sweep."""


def main(arguments: list[str]) -> int:
    """Run one command; the exit code is 1 when a rule was broken."""
    options = _parser().parse_args(arguments)
    result: int = options.act(options)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sim", description="A whole mesh in one thread from one seed.")
    parser.set_defaults(act=_one)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--profile", choices=sorted(PROFILES), default="wan")
    parser.add_argument("--until", type=float, default=120.0, help="virtual seconds")
    commands = parser.add_subparsers()
    many = commands.add_parser("sweep", help="many seeds; the profiles in turn")
    many.set_defaults(act=_sweep)
    many.add_argument("--seeds", type=int, default=300)
    many.add_argument("--first", type=int, default=0, help="go on from this seed: a stopped sweep names it")
    many.add_argument("--jobs", type=int, default=1)
    many.add_argument("--nodes", type=int, default=5)
    many.add_argument("--until", type=float, default=120.0, help="virtual seconds")
    table = commands.add_parser("report", help="the table of bars, measured")
    table.set_defaults(act=_report)
    table.add_argument("--small", action="store_true", help="without the meshes of 256 nodes")
    table.add_argument("--long", action="store_true", help="as often as the bars ask for (an hour)")
    table.add_argument("--only", nargs="+", choices=list(report.measurements(long=False)), help="these groups alone")
    return parser


def _sweep(options: argparse.Namespace) -> int:
    old = sweeping.failed_once()
    wanted = [*old, *sweeping.settings(options.first, options.seeds, options.nodes, options.until)]
    began, told_at, seconds = time.perf_counter(), 0.0, 0.0
    done = broken = 0
    stopped = ""

    def count() -> str:
        wall = time.perf_counter() - began
        return f"{done} runs, {broken} broken, {seconds:,.0f} node-seconds in {wall:.0f} s"

    try:
        for outcome in sweeping.sweep(wanted, options.jobs):
            done += 1
            seconds += outcome.node_seconds
            if not outcome.good:
                broken += 1
                print(told(outcome), flush=True)
            if time.perf_counter() - began >= told_at + PROGRESS_S:
                told_at = time.perf_counter() - began
                print(f"{count()}; {len(wanted) - done} to go", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        seen = max(0, done - len(old))
        stopped = f"; stopped: go on with --first {options.first + seen} --seeds {options.seeds - seen}"
    print(count() + stopped)
    return 1 if broken or stopped else 0


def _report(options: argparse.Namespace) -> int:
    wanted = report.measurements(long=options.long)
    names = options.only or [name for name in wanted if not (options.small and name in report.LARGE)]
    measured: list[report.Row] = []
    for name in names:
        for row in report.timed(wanted[name]):
            measured.append(row)
            print(f"{row.what}: {row.measured} (bar {row.bar}), {row.wall_s:.0f} s", file=sys.stderr, flush=True)
    print(report.table(measured))
    return 0 if all(row.good for row in measured) else 1


def _one(options: argparse.Namespace) -> int:
    setting = Setting(options.seed, options.nodes, options.profile, options.until)
    began = time.perf_counter()
    outcome = run(setting)
    wall = time.perf_counter() - began
    speed = outcome.node_seconds / wall
    print(
        f"trace {outcome.trace}  {outcome.events} events  {outcome.applied} announcements applied  "
        f"{outcome.answers} requests answered  {outcome.lies} lies told  "
        f"{wall:.1f} s, {speed:.0f} node-seconds per second"
    )
    if not outcome.good:
        print(told(outcome))
    return 0 if outcome.good else 1


def told(outcome: Outcome) -> str:
    """A failure, with what repeats it."""
    lines = [
        f"BROKEN: {outcome.rule} at {outcome.ended_at:.6f} s, event {outcome.events}, trace {outcome.trace}",
        f"  {outcome.detail}",
        *(f"    {line}" for line in outcome.tail),
        f"  again: {outcome.setting.command}    (commit {_commit()})",
    ]
    return "\n".join(lines)


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S607
    return found.stdout.strip() or "unknown"
