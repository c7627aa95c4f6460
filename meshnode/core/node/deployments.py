"""The models this node was asked for, and the run that serves each: when to plan, when to try again.

    WAITING --inventory changed, retry time reached--> PLANNING --plan--> RUNNING --run ended--> WAITING
                                                       PLANNING --shortfall--> WAITING

Invariant: at most one run per deployment is under way, and a deployment that is wanted always has a run, a plan in the
making, or a time or change that starts the next plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from meshnode.core.coordination.run import Ended, Hops, Run
from meshnode.core.planning.demand import Demand
from meshnode.core.planning.footprint import ModelFootprint
from meshnode.core.planning.inventory import Inventory, NodeInventory
from meshnode.core.planning.plan import Plan
from meshnode.core.planning.shortfall import Shortfall
from meshnode.identity.certificates import head_name, stage_name
from meshnode.identity.ids import NodeId
from meshnode.wire.fence import Fence, Term, run_id
from meshnode.wire.messages import Claim, ClaimedStage, RunOptions

SETTLE_S = 0.2
"""A change of the inventory waits this long for the next one, so that three joining nodes make one plan."""
RETRY_MIN_S = 0.5
RETRY_MAX_S = 30.0
EXCLUDE_S = 30.0
EXCLUDE_MAX_S = 600.0
STARTUP_TIMEOUT_S = 600.0
"""Since the last progress of any stage (COORDINATION): a slow disk reads a slice for minutes."""
CHUNK = 128
"""Rows of a prefill chunk: measured best of 64, 128, 512 over two stages (SERVING, prefill)."""


class Phase(Enum):
    """Where a deployment is; the run has states of its own."""

    WAITING = "waiting"
    PLANNING = "planning"
    RUNNING = "running"


@dataclass
class Exclusion:
    """A node this coordinator does not plan with for a while."""

    until: float
    reason: str
    times: int = 1


@dataclass
class Deployment:
    """One wanted model."""

    demand: Demand
    footprint: ModelFootprint
    created: int
    plan_at: float | None
    phase: Phase = Phase.WAITING
    serial: int = 0
    run: Run | None = None
    plan: Plan | None = None
    note: str = ""
    failures: int = 0
    term: int = 0
    excluded: dict[NodeId, Exclusion] = field(default_factory=dict)

    def changed(self, now: float) -> None:
        """The inventory changed: plan again soon, if a plan is what is missing."""
        if self.phase is Phase.WAITING and (self.plan_at is None or self.failures == 0):
            self.plan_at = now + SETTLE_S

    def due(self, now: float) -> bool:
        """Whether to plan now; True marks a plan as being made."""
        if self.phase is not Phase.WAITING or self.plan_at is None or now < self.plan_at:
            return False
        self.phase, self.plan_at, self.serial = Phase.PLANNING, None, self.serial + 1
        return True

    def view(self, inventory: Inventory, now: float) -> Inventory:
        """The inventory as this deployment may use it."""
        self.excluded = {node: x for node, x in self.excluded.items() if now < x.until + EXCLUDE_MAX_S}
        return Inventory(tuple(self._judged(node, now) for node in inventory.nodes), inventory.links)

    def planned(self, serial: int, outcome: Plan | Shortfall, draw: Callable[[int], bytes], now: float) -> Run | None:
        """Take a plan; a run to start, or None."""
        if self.phase is not Phase.PLANNING or serial != self.serial:
            return None
        if isinstance(outcome, Shortfall):
            self.phase, self.note = Phase.WAITING, outcome.text()
            # Exclusions that ended are remembered for their count, and are no reason to plan again.
            self.plan_at = min((x.until for x in self.excluded.values() if x.until > now), default=None)
            return None
        self.phase, self.plan, self.note = Phase.RUNNING, outcome, ""
        self.term += 1
        claim = claim_of(outcome, Fence(Term(self.term), run_id(draw(8))), len(self.footprint.layers))
        self.run = Run(claim, self.demand.author, hops_of(claim, draw), STARTUP_TIMEOUT_S)
        return self.run

    def plan_failed(self, serial: int, message: str, now: float) -> None:
        """No plan and no shortfall either: try again later, and show why."""
        if self.phase is Phase.PLANNING and serial == self.serial:
            self.phase, self.note, self.failures = Phase.WAITING, message, self.failures + 1
            self.plan_at = now + RETRY_MAX_S

    def ended(self, end: Ended, now: float) -> None:
        """The run ended: when to plan the next, and whom to leave out of it."""
        self.run, self.phase = None, Phase.WAITING
        self.note = end.message
        self.term = max(self.term, end.promised)
        self.failures = 0 if end.served else self.failures + 1
        if end.node is not None and not end.served and end.reason not in ("participant_lost", "old_term", "stage_lost"):
            times = self.excluded[end.node].times + 1 if end.node in self.excluded else 1
            until = now + min(EXCLUDE_S * 2 ** (times - 1), EXCLUDE_MAX_S)
            self.excluded[end.node] = Exclusion(until, end.reason, times)
        self.plan_at = now + (SETTLE_S if not self.failures else min(RETRY_MIN_S * 2**self.failures, RETRY_MAX_S))

    def _judged(self, node: NodeInventory, now: float) -> NodeInventory:
        exclusion = self.excluded.get(node.node)
        if exclusion is None or now >= exclusion.until:
            return node
        return msgspec.structs.replace(node, excluded="failed")


def claim_of(plan: Plan, fence: Fence, layers: int) -> Claim:
    """The claim that asks for exactly what `plan` uses."""
    stages = tuple(
        ClaimedStage(
            stage=index,
            node=stage.node,
            first=stage.first,
            last=stage.last,
            weight_bytes=stage.weight_bytes + stage.embedding_bytes + stage.output_bytes,
            kv_bytes=stage.kv_bytes + stage.state_bytes,
            reserved_bytes=stage.total_bytes,
        )
        for index, stage in enumerate(plan.stages)
    )
    options = RunOptions(plan.context, plan.lanes, CHUNK, plan.kv_type, plan.flash_attention)
    return Claim(
        fence=fence,
        deployment=plan.deployment,
        model=plan.model,
        manifest_digest=plan.manifest_digest,
        plan_digest=plan.digest,
        coordinator=plan.coordinator,
        layers=layers,
        options=options,
        stages=stages,
    )


def hops_of(claim: Claim, draw: Callable[[int], bytes]) -> Hops:
    """Fresh hop tokens and the certificate names of both ends of every hop."""
    run = claim.fence.run
    names = (*(stage_name(s.stage, run, s.node) for s in claim.stages), head_name(run, claim.coordinator))
    return Hops(tuple(draw(16) for _ in names), names)


def without_this(reserved: dict[str, int], deployment: str) -> int:
    """Bytes that other deployments than `deployment` hold."""
    return sum(size for name, size in reserved.items() if name != deployment)
