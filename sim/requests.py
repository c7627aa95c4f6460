"""What clients of a simulated mesh get, judged from outside: every request ends once, and with the right tokens.

tokens     what comes is what the whole model in one piece says next: none lost, doubled or out of order
requests   nothing follows the end of a request; every end comes in time, and with the end of its run at the latest
stale      no stage computes for a run that its node does not hold
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshnode.core.serving.request import Sampled
from meshnode.wire.fence import Fence

if TYPE_CHECKING:
    from sim.checks import Checks
    from sim.machine import Machine

PATIENCE_S = 60.0
"""A lane without progress is given up after 30 s, and a broken pipeline within seconds."""


@dataclass
class Asked:
    """One request that was accepted and has not ended."""

    deployment: str
    fence: Fence
    expected: list[int]
    since: float
    got: int = 0


class Requests:
    """All requests of one world."""

    def __init__(self, checks: Checks) -> None:
        self.checks = checks
        self.open: dict[str, Asked] = {}
        self.count = self.answered = self.lost = 0
        self.answered_by: dict[str, float] = {}
        """When the last one was answered in full, by deployment."""

    def new_id(self) -> str:
        """Never the same twice."""
        self.count += 1
        return f"r{self.count}"

    def accepted(self, request: str, of: tuple[str, Fence], expected: list[int], now: float) -> None:
        """The head took a request; `of` names its deployment and run."""
        for name, asked in self.open.items():
            if asked.since + PATIENCE_S < now:
                self.checks.fail("requests", f"{name} has had no end for {PATIENCE_S:g} s")
        self.open[request] = Asked(*of, expected, now)

    def token(self, request: str, sampled: Sampled, now: float) -> None:
        """A client got one token."""
        asked = self._of(request)
        if asked is None:
            return
        if asked.got >= len(asked.expected) or sampled.token != asked.expected[asked.got]:
            self.checks.fail("tokens", f"{request}: {sampled.token} at {asked.got}, expected {asked.expected}")
        asked.got += 1
        self.checks.world.note_frame(request, sampled.token.to_bytes(4, "big"))
        if sampled.finish:
            if asked.got != len(asked.expected):
                self.checks.fail("tokens", f"{request} ended after {asked.got} of {len(asked.expected)} tokens")
            self.answered += 1
            self.answered_by[asked.deployment] = now
            del self.open[request]

    def failed(self, request: str) -> None:
        """A client got an error."""
        if self._of(request) is not None:
            self.lost += 1
            del self.open[request]

    def cancelled(self, request: str) -> None:
        """A client went away; it may have had its answer."""
        self.open.pop(request, None)

    def died(self, fence: Fence) -> None:
        """The machine of head and clients died."""
        self.open = {name: asked for name, asked in self.open.items() if asked.fence != fence}

    def all_ended(self, fence: Fence) -> None:
        """The run is over."""
        left = [name for name, asked in self.open.items() if asked.fence == fence]
        if left:
            self.checks.fail("requests", f"{len(left)} have no end although {fence} has, first {left[0]}")

    def computes(self, machine: Machine, fence: Fence) -> None:
        """A stage is given rows."""
        if machine.mediator is None or fence not in machine.mediator.ledger.held:
            self.checks.fail("stale", f"{machine.name} computes for {fence}, which it does not hold")

    def _of(self, request: str) -> Asked | None:
        asked = self.open.get(request)
        if asked is None:
            self.checks.fail("requests", f"{request} goes on after its end")
        return asked
