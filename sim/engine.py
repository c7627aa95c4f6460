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
from meshnode.wire.demand import Demand
from meshnode.wire.fence import Fence
from meshnode.wire.messages import Claim, Connected, Failed, Fetched, Prepare, Progress, Ready
from sim.tokens import POLL_S, Pipeline, Slice

if TYPE_CHECKING:
    from sim.machine import Machine

PLAN_S = 0.02
LOAD_S = 0.3
FETCH_S = 1.0
ADOPT_S = 0.02
OPEN_S = 0.6
"""A process that reads a vocabulary of 32,000 tokens, and the footprint."""
CONNECT_S = 0.05
SILENCE_S = 2.0
"""Heartbeats come every 250 ms; a pipeline is lost after so long without (NETWORK)."""
WATCH_S = 0.5


class Engine:
    """Everything native on one machine, in one life of its node."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.stages: dict[Fence, dict[int, Slice]] = {}
        self.fetching: set[tuple[Fence, int]] = set()
        """Stages of a run that waits for memory: nothing of them is loaded."""
        self.heads: dict[Fence, Pipeline] = {}
        self.serving: set[Fence] = set()
        """Heads that take requests."""
        self.kept: dict[tuple[Fence, int], Slice] = {}
        """Loaded stages of another run that wait for their new place."""
        self.reached_at: dict[Fence, float] = {}

    def carry_out(self, effect: do.Effect) -> None:
        """Carry out one order."""
        match effect:
            case do.MakePlan():
                self._plan(effect)
            case do.OpenModel():
                self._open_model(effect.demand)
            case do.PrepareStage():
                self._prepare(effect.order)
            case do.ConnectStages():
                self._connect(effect.fence)
            case do.StopStages():
                self._stop(effect)
            case do.RenewStages():
                pass  # a stage here ends with its node, or by its order
            case do.OpenHead():
                self.heads[effect.claim.fence] = Pipeline(self.machine, effect.claim)
                self.machine.after(CONNECT_S * 2, lambda: self._open(effect.claim))
            case do.ServeHead():
                if effect.fence in self.heads:  # else it was lost, and the mediator is about to hear of it
                    self.serving.add(effect.fence)
                    self.heads[effect.fence].begin()
            case do.DrainHead():
                self._drain(effect.fence)
            case do.CloseHead():
                self._close(effect.fence)
            case _:
                self.machine.world.unhandled(self.machine, effect)

    def stop_all(self) -> None:
        """The machine died."""
        for head in self.heads.values():
            head.crashed()
        self.stages.clear()
        self.heads.clear()
        self.serving.clear()
        self.kept.clear()
        self.fetching.clear()

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

    def _open_model(self, demand: Demand) -> None:
        """What a head needs lies beside every slice."""
        digest = demand.manifest_digest
        if digest in self.machine.disk.told():
            opened = on.ModelOpened(demand.deployment, self.machine.world.models[digest])
            self.machine.later(OPEN_S * (0.5 + self.machine.random.random()), opened)
        else:
            self.machine.later(0.01, on.ModelNotOpened(demand.deployment, "nothing of it is here"))

    def _lacks(self, order: Prepare) -> bool:
        """Whether some layer lies neither here nor with who is named for it and runs."""
        machines = self.machine.world.machines
        named = (order.source, *order.sources)
        there = [machines[node] for node in named if node in machines and machines[node].mediator is not None]
        held = [machine.disk.layers(order.manifest_digest) for machine in (self.machine, *there)]
        return not set(range(order.first, order.last)) <= set().union(*held)

    def _fetched(self, order: Prepare) -> None:
        disk = self.machine.disk
        before = disk.told()
        disk.fetched(order.manifest_digest, order.first, order.last)
        if disk.told() != before:
            self.machine.hand(on.CacheChanged(disk.told()))

    def _prepare(self, order: Prepare) -> None:
        fence, stage = order.fence, order.stage
        self.stages.setdefault(fence, {})[stage] = Slice(stage, order.first, order.last)
        self.fetching.discard((fence, stage))
        if order.hold:
            self.fetching.add((fence, stage))
            self._report(FETCH_S * self.machine.random.random(), Fetched(fence, stage))
            return
        loaded = self.kept.pop((fence, stage), None)
        if loaded is not None:
            if loaded.layers != range(order.first, order.last):
                self.machine.world.checks.fail("tokens", f"{fence}: stage {stage} adopts other layers than it has")
            self._report(ADOPT_S, Ready(fence, stage))
            return
        if self._lacks(order):
            self._report(LOAD_S / 2, Failed(fence, stage, "fetch_failed", "nobody who was named has its bytes"))
            return
        if self._fails():
            self._report(LOAD_S / 2, Failed(fence, stage, "load_failed", "the slice does not load"))
            return
        self.machine.after(LOAD_S / 2, lambda: self._fetched(order))
        load = LOAD_S * (1 + self.machine.random.random())
        self._report(load / 2, Progress(fence, stage, "loading", 500, 1000))
        if self._fails():
            self._report(load, Failed(fence, stage, "probe_failed", "the probe gave no numbers"))
        else:
            self._report(load, Ready(fence, stage))

    def _stop(self, order: do.StopStages) -> None:
        stages = self.stages.pop(order.fence, {})
        self.fetching -= {(order.fence, stage) for stage in stages}
        for key in [key for key in self.kept if key[0] == order.fence]:
            del self.kept[key]
        for kept in order.kept:
            if kept.before in stages:
                self.kept[kept.fence, kept.stage] = stages[kept.before]

    def _drain(self, fence: Fence) -> None:
        if fence in self.serving:
            self.serving.discard(fence)
            self.heads[fence].drain()
            self._drained(fence)

    def _drained(self, fence: Fence) -> None:
        head = self.heads.get(fence)
        if head is None:
            return
        if head.busy:
            self.machine.after(POLL_S, lambda: self._drained(fence))
        else:
            self.machine.hand(on.HeadDrained(fence))

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
            self.heads[claim.fence].expire()
            if self.machine.random.random() < self.machine.world.faults.step_failure:
                self._lost(claim.fence, "a stage gave numbers that are none")
                return
        elif now - self.reached_at[claim.fence] >= SILENCE_S:
            self._lost(claim.fence, "silence in the pipeline")
            return
        self.machine.after(WATCH_S, lambda: self._watch(claim))

    def _close(self, fence: Fence) -> None:
        self.serving.discard(fence)
        head = self.heads.pop(fence, None)
        if head is not None:
            head.close()

    def _lost(self, fence: Fence, message: str) -> None:
        self._close(fence)
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
