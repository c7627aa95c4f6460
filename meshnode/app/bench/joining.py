"""`meshnode bench join`: how long people wait for a mesh. Real processes and real multicast on loopback.

Every round begins from nothing: a mesh is made, a machine without an invite looks around, another joins by invite, both
end, both come back on other ports than they know of each other, so that only mDNS can bring them together.
"""

from __future__ import annotations

import os
import select
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

import httpx
import msgspec
from rich.console import Console
from rich.table import Table

from meshnode.app.admin import InviteRequest
from meshnode.app.cli.control import Control
from meshnode.app.trial import LEAVE_S, TrialNode, awaited, on_trial
from meshnode.core.node.status import NodeStatus
from meshnode.demo import MODEL
from meshnode.errors import ConfigError
from meshnode.identity.ids import MeshId, short

BARS: Final = {"joined": 2.0, "seen": 4.0, "rejoined": 4.0}
"""Seconds (NETWORK, issue 3); an answer through the model depends on the model and has none."""
MEANINGS: Final = {
    "joined": "`join INVITE` until both sides list each other",
    "answering": "`join INVITE` until its endpoint lists the model",
    "seen": "`join` without an invite until the mesh is on the screen",
    "rejoined": "`join` of a member until both are linked, found by mDNS alone",
}
MOST_ROUNDS: Final = 100
"""A round takes 15 s."""
_STEP_S: Final = 60.0
"""For any one step: twenty times what it takes, so that a hang ends."""
_POLL_S: Final = 0.02
"""What a figure may be too high by; looking more often would slow down what is looked at."""


@dataclass(frozen=True)
class JoinOptions:
    """What to measure."""

    rounds: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= MOST_ROUNDS:
            raise ConfigError(f"--rounds {self.rounds} is not between 1 and {MOST_ROUNDS}")


class Wait(msgspec.Struct, frozen=True):
    """One of the things that a person waits for; seconds."""

    name: str
    meaning: str
    median_s: float
    worst_s: float
    bar_s: float | None
    seconds: tuple[float, ...]
    """Of every round, in order."""
    within: bool
    """worst_s <= bar_s, or no bar."""


class JoinReport(msgspec.Struct, frozen=True):
    """The object of `bench join --json`."""

    rounds: int
    waits: tuple[Wait, ...]
    within: bool


def run_join(options: JoinOptions, progress: Callable[[str], None] = lambda _: None) -> JoinReport:
    """Measure. Raises ConfigError, Unavailable."""
    found: dict[str, list[float]] = {name: [] for name in MEANINGS}
    for number in range(options.rounds):
        progress(f"round {number + 1} of {options.rounds}")
        with tempfile.TemporaryDirectory(prefix="meshnode-bench-") as folder:
            for name, seconds in _round(Path(folder)).items():
                found[name].append(seconds)
    waits = tuple(_wait(name, seconds) for name, seconds in found.items())
    return JoinReport(options.rounds, waits, all(wait.within for wait in waits))


def _wait(name: str, seconds: Sequence[float]) -> Wait:
    bar, worst = BARS.get(name), max(seconds)
    rounded = tuple(round(each, 3) for each in seconds)
    return Wait(
        name=name,
        meaning=MEANINGS[name],
        median_s=round(median(seconds), 3),
        worst_s=round(worst, 3),
        bar_s=bar,
        seconds=rounded,
        within=bar is None or worst <= bar,
    )


def _round(folder: Path) -> dict[str, float]:
    founder, stranger, joiner = (
        TrialNode(folder, name, "--memory", "1GB", "--threads", "1") for name in ("founder", "stranger", "joiner")
    )
    with on_trial([founder, stranger, joiner]):
        founder.start("serve", str(MODEL))
        with _control(founder) as control:
            _until(lambda: control.status().deployments and _models(control), [founder], "the model is served")
            seen = _seen(stranger, control.status().mesh)
            joined, answering = _joined(joiner, founder, control)
        for node in (joiner, founder):
            node.ask_to_leave()
            node.wait(LEAVE_S)
        founder.start("join")
        with _control(founder) as control:
            begun = time.monotonic()
            joiner.start("join")
            rejoined = _linked(joiner, founder, control) - begun
    return {"joined": joined, "answering": answering, "seen": seen, "rejoined": rejoined}


def _seen(stranger: TrialNode, mesh: str) -> float:
    """A person at a terminal who types `meshnode join` and reads."""
    import pty  # there is none on Windows, where the other benches may run

    ours, theirs = pty.openpty()
    try:
        begun = time.monotonic()
        stranger.start("join", terminal=theirs)
        os.close(theirs)
        wanted, screen = f"mesh {short(MeshId(mesh))}".encode(), b""

        def looks() -> bool:
            nonlocal screen
            while select.select([ours], [], [], 0)[0]:
                screen += os.read(ours, 4096)
            return wanted in screen

        _until(looks, [stranger], "the mesh is seen by mDNS")
        seen = time.monotonic() - begun
        stranger.ask_to_leave()
        stranger.wait(LEAVE_S)
        return seen
    finally:
        os.close(ours)


def _joined(joiner: TrialNode, founder: TrialNode, control: Control) -> tuple[float, float]:
    invite = control.invite(InviteRequest(expires_s=600)).invite
    begun = time.monotonic()
    joiner.start("join", invite)
    joined = _linked(joiner, founder, control) - begun
    with _control(joiner) as own:
        _until(lambda: _models(own), [founder, joiner], "the joiner lists the model")
    return joined, time.monotonic() - begun


def _linked(joiner: TrialNode, founder: TrialNode, control: Control) -> float:
    """When both list each other as linked, by the monotonic clock."""
    own: Control | None = None

    def both() -> bool:
        nonlocal own
        own = own or joiner.control()
        if own is None:
            return False
        here, there = own.status(), control.status()
        return _links(here.node, there) and _links(there.node, here)

    try:
        _until(both, [founder, joiner], "both sides list each other")
        return time.monotonic()
    finally:
        if own is not None:
            own.close()


def _links(node: str, status: NodeStatus) -> bool:
    return any(peer.node == node and peer.state == "linked" for peer in status.peers)


def _models(control: Control) -> bool:
    url = f"{control.status().api_url}/v1/models"
    try:
        return bool(httpx.get(url, timeout=_STEP_S, trust_env=False).json()["data"])
    except httpx.HTTPError:
        return False


def _control(node: TrialNode) -> Control:
    return awaited(node.control, [node], time.monotonic() + _STEP_S, lambda: f"{node.name} does not answer", _POLL_S)


def _until(look: Callable[[], object], nodes: Sequence[TrialNode], what: str) -> None:
    deadline = time.monotonic() + _STEP_S
    awaited(lambda: look() or None, nodes, deadline, lambda: f"not within {_STEP_S:.0f} s: {what}", _POLL_S)


def print_join(report: JoinReport, console: Console) -> None:
    """The report for people, in seconds."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("MEDIAN S", "WORST", "BAR"):
        table.add_column(name, justify="right")
    table.add_column("FROM THE START OF")
    table.add_column("")
    for wait in report.waits:
        bar = "" if wait.bar_s is None else f"{wait.bar_s:g}"
        row = (f"{wait.median_s:.2f}", f"{wait.worst_s:.2f}", bar, wait.meaning, "" if wait.within else "too slow")
        table.add_row(*row)
    console.print(table)
    console.print(f"{report.rounds} rounds, real processes and multicast on loopback")
