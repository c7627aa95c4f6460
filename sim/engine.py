"""Stands in for planner threads, stage processes and heads of one machine: when they finish, and how they fail.

The planner is the real one. A stage is what it claims to be as long as its machine runs, its node wants it, and the
machines on both sides can be reached; a pipeline that breaks is noticed after 2 s of silence, as by real heartbeats.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.core.planning import make_plan
from meshnode.errors import MeshError
from meshnode.identity.ids import NodeId
from meshnode.wire.fence import Fence
from meshnode.wire.messages import Claim, Connected, Failed, Fetched, Prepare, Progress, Ready

if TYPE_CHECKING:
    from sim.machine import Machine

PLAN_S = 0.02
LOAD_S = 0.3
FETCH_S = 1.0
ADOPT_S = 0.02
CONNECT_S = 0.05
STREAMS_S = 3.0
"""Answers under way take so long at most."""
SILENCE_S = 2.0
"""Heartbeats come every 250 ms; a pipeline is lost after so long without (NETWORK)."""
WATCH_S = 0.5


class Engine:
    """Everything native on one machine, in one life of its node."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.stages: dict[Fence, dict[int, str]] = {}
        self.heads: dict[Fence, Claim] = {}
        self.serving: dict[Fence, Claim] = {}
        """Heads that take requests."""
        self.kept: dict[tuple[Fence, int], str] = {}
        """Loaded stages of another run that wait for their new place."""
        self.reached_at: dict[Fence, float] = {}

    def carry_out(self, effect: do.Effect) -> None:
        """Carry out one order."""
        match effect:
            case do.MakePlan():
                self._plan(effect)
            case do.PrepareStage():
                self._prepare(effect.order)
            case do.ConnectStages():
                self._connect(effect.fence)
            case do.StopStages():
                self._stop(effect)
            case do.RenewStages():
                pass  # a stage here ends with its node, or by its order
            case do.OpenHead():
                self.heads[effect.claim.fence] = effect.claim
                self.machine.after(CONNECT_S * 2, lambda: self._open(effect.claim))
            case do.ServeHead():
                if effect.fence in self.heads:  # else it was lost, and the mediator is about to hear of it
                    self.serving[effect.fence] = self.heads[effect.fence]
            case do.DrainHead():
                self._drain(effect.fence)
            case do.CloseHead():
                self.heads.pop(effect.fence, None)
                self.serving.pop(effect.fence, None)
            case _:
                self.machine.world.unhandled(self.machine, effect)

    def stop_all(self) -> None:
        """The machine died."""
        self.stages.clear()
        self.heads.clear()
        self.serving.clear()
        self.kept.clear()

    def alive(self, fence: Fence, stage: int) -> bool:
        """Whether this stage process runs, and is not frozen with its machine."""
        return stage in self.stages.get(fence, {}) and not self.machine.paused

    def _plan(self, order: do.MakePlan) -> None:
        try:
            outcome = make_plan(order.demand, order.footprint, order.inventory)
        except MeshError as error:
            self.machine.later(PLAN_S, on.PlanFailed(order.deployment, order.serial, str(error)))
            return
        self.machine.later(PLAN_S, on.Planned(order.deployment, order.serial, outcome))

    def _prepare(self, order: Prepare) -> None:
        fence, stage = order.fence, order.stage
        if order.hold:
            self.stages.setdefault(fence, {})[stage] = "fetching"
            self._report(FETCH_S * self.machine.random.random(), Fetched(fence, stage))
            return
        if self.kept.pop((fence, stage), None) is not None:
            self.stages.setdefault(fence, {})[stage] = "adopted"
            self._report(ADOPT_S, Ready(fence, stage))
            return
        self.stages.setdefault(fence, {})[stage] = "loading"
        if self._fails():
            self._report(LOAD_S / 2, Failed(fence, stage, "load_failed", "the slice does not load"))
            return
        load = LOAD_S * (1 + self.machine.random.random())
        self._report(load / 2, Progress(fence, stage, "loading", 500, 1000))
        if self._fails():
            self._report(load, Failed(fence, stage, "probe_failed", "the probe gave no numbers"))
        else:
            self._report(load, Ready(fence, stage))

    def _stop(self, order: do.StopStages) -> None:
        stages = self.stages.pop(order.fence, {})
        for key in [key for key in self.kept if key[0] == order.fence]:
            del self.kept[key]
        for kept in order.kept:
            if kept.before in stages:
                self.kept[kept.fence, kept.stage] = stages[kept.before]

    def _drain(self, fence: Fence) -> None:
        claim = self.serving.pop(fence, None)
        if claim is not None:
            self.machine.later(STREAMS_S * self.machine.random.random(), on.HeadDrained(fence))

    def _connect(self, fence: Fence) -> None:
        for stage in self.stages.get(fence, {}):
            self._report(CONNECT_S, Connected(fence, stage))

    def _open(self, claim: Claim) -> None:
        if claim.fence not in self.heads:
            return
        if not self._whole(claim):
            self._lost(claim.fence, "the probe did not come back")
            return
        self.reached_at[claim.fence] = self.machine.world.now
        self.machine.hand(on.HeadOpened(claim.fence))
        self.machine.after(WATCH_S, lambda: self._watch(claim))

    def _watch(self, claim: Claim) -> None:
        if claim.fence not in self.heads:
            return
        now = self.machine.world.now
        if self._whole(claim):
            self.reached_at[claim.fence] = now
            if self.machine.random.random() < self.machine.world.faults.step_failure:
                self._lost(claim.fence, "a stage gave numbers that are none")
                return
        elif now - self.reached_at[claim.fence] >= SILENCE_S:
            self._lost(claim.fence, "silence in the pipeline")
            return
        self.machine.after(WATCH_S, lambda: self._watch(claim))

    def _lost(self, fence: Fence, message: str) -> None:
        self.heads.pop(fence, None)
        self.serving.pop(fence, None)
        self.machine.hand(on.HeadFailed(fence, message))

    def _whole(self, claim: Claim) -> bool:
        """Whether a token could go round: every stage lives, and each can reach the next."""
        if self.machine.paused:
            return False
        nodes: list[NodeId] = [self.machine.node, *(stage.node for stage in claim.stages), self.machine.node]
        network, machines = self.machine.world.network, self.machine.world.machines
        ways = itertools.pairwise(nodes)
        if any(a != b and (network.way(a, b).blocked or network.way(b, a).blocked) for a, b in ways):
            return False
        return all(machines[stage.node].engine.alive(claim.fence, stage.stage) for stage in claim.stages)

    def _fails(self) -> bool:
        return self.machine.random.random() < self.machine.world.faults.stage_failure

    def _report(self, delay: float, report: Progress | Fetched | Ready | Connected | Failed) -> None:
        fence, stage = report.fence, report.stage

        def tell() -> None:
            if stage in self.stages.get(fence, {}):
                self.machine.hand(on.StageReported(report))

        self.machine.after(delay, tell)
