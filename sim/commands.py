"""The command line of the simulator."""

from __future__ import annotations

import argparse
import subprocess
import time

from sim.profiles import PROFILES
from sim.trial import Outcome, Setting, run


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
    return parser


def _one(options: argparse.Namespace) -> int:
    setting = Setting(options.seed, options.nodes, options.profile, options.until)
    began = time.perf_counter()
    outcome = run(setting)
    wall = time.perf_counter() - began
    speed = outcome.ended_at * setting.nodes / wall
    print(
        f"trace {outcome.trace}  {outcome.events} events  {outcome.applied} announcements applied  "
        f"{outcome.lies} lies told  {wall:.1f} s, {speed:.0f} node-seconds per second"
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
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
