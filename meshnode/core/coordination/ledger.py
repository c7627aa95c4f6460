"""A participant's side: this node's memory and the only judge of it.

Invariants: the booked bytes of all held runs never exceed the capacity; `promised` and `fenced` never go back; an order
is obeyed only for a held run, by exact (term, run), from the coordinator that claimed it; a run is held only as long as
its lease, and a run that serves is freed by its coordinator's word, by the end of its lease, or for a claimer when this
node itself finds the holder lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from meshnode.core.coordination.rules import COORDINATION_RULES, CoordinationRules
from meshnode.errors import ConfigError, PeerError, StaleFence
from meshnode.identity.ids import NodeId
from meshnode.wire.demand import DEPLOYMENT_CHARACTERS
from meshnode.wire.fence import Fence, is_fence
from meshnode.wire.messages import (
    Claim,
    ClaimedStage,
    Connected,
    Failed,
    FenceOff,
    Fetched,
    Grant,
    Prepare,
    Progress,
    Ready,
    Refuse,
)

TERM_JUMP = 1000
"""A claim further above `promised` than this is refused: a liar must not use up the terms."""
DEPLOYMENTS = 1024
"""Deployments with a promised term: three years of daily starts of a node that serves. 46 bytes each at most, together
48 KB: the disk keeps 64 KiB."""
RUNS_HELD = 64
"""Runs on one node; each holds memory, so this only bounds the bookkeeping of tiny ones."""
RUNS_OF_ONE = 32
"""Of them, those of one coordinator: one that serves and one on its way of each of the 16 deployments that a node may
coordinate. Claims of a byte each leave the other half to others."""
LEASE_S = 15.0
"""From the receipt of a claim or a renewal: a node frees what nobody renews (COORDINATION)."""

Report = Progress | Fetched | Ready | Connected | Failed


class Word(msgspec.Struct, array_like=True):
    """What this node has said about one deployment; on disk before it is spoken."""

    promised: int = 0
    """The highest term granted."""
    committed: int = 0
    """The highest term whose commit was decided or acknowledged here."""
    fenced: int = 0
    """Terms up to here never serve again."""


@dataclass
class HeldRun:
    """A run this node granted: what was claimed, and how far its stages here are."""

    claim: Claim
    until: float
    """When its lease ends, by this node's clock."""
    progress: dict[int, Progress] = field(default_factory=dict)
    states: dict[int, str] = field(default_factory=dict)
    committed: bool = False

    def own(self, node: NodeId) -> list[ClaimedStage]:
        """The stages that `node` runs."""
        return [stage for stage in self.claim.stages if stage.node == node]

    def booked(self, node: NodeId) -> int:
        """Bytes of its stages on `node`; one whose process ended holds none."""
        return sum(stage.reserved_bytes for stage in self.own(node) if self.states.get(stage.stage) != "failed")


class Ledger:
    """Everything that this node has promised and reserved."""

    def __init__(self, node: NodeId, capacity: int, rules: CoordinationRules = COORDINATION_RULES) -> None:
        self.node = node
        self.capacity = capacity
        self.rules = rules
        self.words: dict[str, Word] = {}
        self.held: dict[Fence, HeldRun] = {}
        self.changes = 0
        """How often `held` became other runs."""
        self.refused = 0

    def claim(self, claim: Claim, now: float, lost: Callable[[NodeId], bool]) -> tuple[Grant | Refuse, list[Fence]]:
        """Judge a claim of its coordinator: the answer, and the unfinished runs that it supersedes.

        `lost(coordinator)` is this node's own evidence that a holder is gone. After a grant the ledger must be
        persisted before the answer is sent. Raises PeerError for an impossible shape.
        """
        self._check_shape(claim)
        known = self.held.get(claim.fence)
        if known is not None:
            if known.claim == claim:
                return Grant(claim.fence, claim.deployment), []
            return self.refuse(claim, "equal_term", "another claim of the same term and run was granted"), []
        refusal = self._judge(claim, now, lost)
        if refusal is not None:
            return refusal, []
        superseded = [fence for fence in self._of_deployment(claim.deployment) if not self.held[fence].committed]
        kept = {fence: run for fence, run in self.held.items() if fence not in superseded}
        if sum(run.claim.coordinator == claim.coordinator for run in kept.values()) >= RUNS_OF_ONE:
            return self.refuse(claim, "too_many", f"{RUNS_OF_ONE} runs of this coordinator are held here"), []
        run = HeldRun(claim, now + LEASE_S)
        run.states = {stage.stage: "claimed" for stage in run.own(self.node)}
        booked = self._booked({**kept, claim.fence: run})
        if self.rules.ledger and (booked > self.capacity or len(kept) >= RUNS_HELD):
            needed = run.booked(self.node)
            free = max(0, self.capacity - (booked - needed))
            refusal = self.refuse(claim, "no_room", f"{needed} bytes are claimed, {free} are free here")
            return msgspec.structs.replace(refusal, free_bytes=free), []
        self.held = {**kept, claim.fence: run}
        self.changes += 1
        self._word(claim.deployment).promised = claim.fence.term
        return Grant(claim.fence, claim.deployment), superseded

    def _judge(self, claim: Claim, now: float, lost: Callable[[NodeId], bool]) -> Refuse | None:
        promised = self.promised.get(claim.deployment, 0)
        if claim.fence.term <= promised:
            return self.refuse(claim, "old_term", f"term {promised} was granted before")
        if claim.fence.term > promised + TERM_JUMP:
            return self.refuse(claim, "term_jump", "the term is too far ahead")
        for fence in self._of_deployment(claim.deployment):
            run = self.held[fence]
            if run.claim.manifest_digest != claim.manifest_digest:
                return self.refuse(claim, "other_model", "this deployment is known here with another manifest")
            other = run.claim.coordinator != claim.coordinator
            if other and self.rules.holder_evidence and now < run.until and not lost(run.claim.coordinator):
                return self.refuse(claim, "held", "another coordinator holds this deployment here", run.claim)
        if len(self.words) >= DEPLOYMENTS and claim.deployment not in self.words:
            return self.refuse(claim, "too_many", "too many deployments were granted here before")
        return None

    # --- orders ---------------------------------------------------------------------------------------------------

    def authorize(self, peer: NodeId, fence: Fence) -> HeldRun:
        """The held run that `peer` may order about. Raises StaleFence otherwise, and counts it."""
        run = self.held.get(fence)
        if run is None or (self.rules.fence and run.claim.coordinator != peer):
            self.refused += 1
            raise StaleFence(f"{fence} is not granted here to this coordinator")
        return run

    def prepare(self, peer: NodeId, order: Prepare) -> ClaimedStage:
        """Check an order against what was claimed, which it gives. Raises StaleFence or PeerError."""
        run = self.authorize(peer, order.fence)
        claimed = next((stage for stage in run.own(self.node) if stage.stage == order.stage), None)
        if claimed is None or (claimed.first, claimed.last) != (order.first, order.last):
            raise PeerError("an order for a stage that was not claimed here")
        if order.options != run.claim.options or order.manifest_digest != run.claim.manifest_digest:
            raise PeerError("an order that differs from its claim")
        if order.stages != len(run.claim.stages) or order.layers != run.claim.layers:
            raise PeerError("an order that differs from its claim")
        if len(order.upstream.token) != 16 or len(order.downstream.token) != 16:
            raise PeerError("an order with a malformed hop token")
        return claimed

    def displaced(self, fence: Fence) -> Fence | None:
        """The held run in whose place `fence` was granted, if it is still there."""
        old = self.held[fence].claim.releases
        return old if old in self.held else None

    def adopted(self, old: Fence, new: Fence) -> dict[int, int]:
        """Stages of `old` that stay loaded as stages of `new`: the same layers with the same memory, still alive."""
        before, after = self.held[old], self.held[new]
        if before.claim.options != after.claim.options or before.claim.layers != after.claim.layers:
            return {}
        alive = {(s.first, s.last): s.stage for s in before.own(self.node) if before.states[s.stage] in _LOADED}
        slices = [(stage.stage, (stage.first, stage.last)) for stage in after.own(self.node)]
        return {alive[layers]: stage for stage, layers in slices if layers in alive}

    def commit(self, peer: NodeId, fence: Fence) -> None:
        """The run is to serve. The ledger must be persisted before it is acknowledged. Raises StaleFence."""
        run = self.authorize(peer, fence)
        run.committed = True
        word = self._word(run.claim.deployment)
        word.committed = max(word.committed, fence.term)

    def decide(self, deployment: str, fence: Fence) -> None:
        """This node, as coordinator, commits a run. To be persisted before anybody hears of it."""
        word = self._word(deployment)
        word.committed = max(word.committed, fence.term)

    def fence(self, peer: NodeId, order: FenceOff) -> list[Fence]:
        """End every run of the deployment below the term of `order`; those to free. Raises StaleFence.

        It comes from the coordinator of the run that now serves: proven by that run where it is held here, by the
        coordinator of the old ones where only they are.
        """
        below = [f for f in self._of_deployment(order.deployment) if f.term < order.fence.term]
        new = self.held.get(order.fence)
        if new is not None:
            if self.rules.fence and (new.claim.coordinator != peer or new.claim.deployment != order.deployment):
                raise self._stale(order.fence)
        elif not below or any(self.held[fence].claim.coordinator != peer for fence in below):
            raise self._stale(order.fence)
        elif order.fence.term > self.promised.get(order.deployment, 0) + TERM_JUMP:
            raise self._stale(order.fence)  # no claim was that far ahead either
        word = self._word(order.deployment)
        word.fenced = max(word.fenced, order.fence.term - 1)
        word.promised = max(word.promised, word.fenced)
        return below

    def note(self, report: Report) -> None:
        """Remember how far a stage of this node is, for the status snapshot."""
        run = self.held.get(report.fence)
        if run is None:
            return
        match report:
            case Progress():
                run.progress[report.stage] = report
                run.states[report.stage] = report.phase
            case Fetched():
                run.states[report.stage] = "fetched"
            case Ready():
                run.states[report.stage] = "ready"
            case Connected():
                run.states[report.stage] = "connected"
            case Failed():
                run.states[report.stage] = "failed"

    def release(self, fence: Fence) -> HeldRun | None:
        """Forget a run and free what it reserved. Idempotent."""
        run = self.held.pop(fence, None)
        if run is not None:
            self.changes += 1
        return run

    # --- leases ---------------------------------------------------------------------------------------------------

    def renew(self, peer: NodeId, fence: Fence, now: float) -> bool:
        """Prolong a lease of `peer`; False when the run is not held here for it."""
        run = self.held.get(fence)
        if run is None or run.claim.coordinator != peer:
            return False
        run.until = now + LEASE_S
        return True

    def ended(self, now: float) -> list[Fence]:
        """The runs whose lease is over."""
        return [fence for fence, run in self.held.items() if now >= run.until]

    def deadline(self) -> float | None:
        """When the next lease ends."""
        return min((run.until for run in self.held.values()), default=None)

    # --- figures --------------------------------------------------------------------------------------------------

    def of_coordinator(self, peer: NodeId) -> list[Fence]:
        """The runs that `peer` coordinates here."""
        return [fence for fence, run in self.held.items() if run.claim.coordinator == peer]

    @property
    def holds_for_others(self) -> bool:
        """Whether a run of another coordinator has memory here."""
        return any(run.claim.coordinator != self.node for run in self.held.values())

    @property
    def promised(self) -> dict[str, int]:
        """The highest term granted, by deployment."""
        return {deployment: word.promised for deployment, word in self.words.items()}

    @property
    def reserved(self) -> dict[str, int]:
        """Bytes booked here, by deployment."""
        deployments = dict.fromkeys(run.claim.deployment for run in self.held.values())
        sums = {name: self._booked({f: self.held[f] for f in self._of_deployment(name)}) for name in deployments}
        return {name: size for name, size in sums.items() if size}

    @property
    def free_bytes(self) -> int:
        """What another claim could still have."""
        return self.capacity - self._booked(self.held)

    def _booked(self, held: dict[Fence, HeldRun]) -> int:
        """A run that takes the place of another is loaded after that one was freed: the larger of the two counts."""
        total = sum(run.booked(self.node) for run in held.values())
        placed = {run.claim.releases: run for run in held.values()}  # one for each: a run is freed only once
        return total - sum(
            min(old.booked(self.node), placed[f].booked(self.node)) for f, old in held.items() if f in placed
        )

    # --- on disk --------------------------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """What must survive a restart: terms stay, reservations are void."""
        return msgspec.msgpack.encode(self.words)

    def restore(self, data: bytes) -> None:
        """Take back what `encode` wrote, now or when only the promised term was kept. Raises ConfigError."""
        try:
            kept = msgspec.msgpack.decode(data, type=dict[str, int | Word])
        except (msgspec.MsgspecError, ValueError) as error:
            raise ConfigError(
                f"the ledger in the data directory is damaged: {error}",
                "Delete the file `ledger` there while no other node of the mesh serves a model with this one.",
            ) from None
        self.words = {key: Word(word) if isinstance(word, int) else word for key, word in kept.items()}

    def _word(self, deployment: str) -> Word:
        return self.words.setdefault(deployment, Word())

    def _held_by_others(self, claim: Claim) -> Claim | None:
        """The run of this deployment that another coordinator had loaded here: who claims may take its place."""
        found = [
            self.held[fence].claim for fence in self._of_deployment(claim.deployment) if self.held[fence].committed
        ]
        others = [each for each in found if each.coordinator != claim.coordinator]
        return max(others, key=lambda each: each.fence, default=None)

    def _of_deployment(self, deployment: str) -> list[Fence]:
        return [fence for fence, run in self.held.items() if run.claim.deployment == deployment]

    def _stale(self, fence: Fence) -> StaleFence:
        self.refused += 1
        return StaleFence(f"{fence} may end nothing here")

    def refuse(self, claim: Claim, reason: str, message: str, holder: Claim | None = None) -> Refuse:
        """No, with what the coordinator should know; counted."""
        self.refused += 1
        promised, free = self.promised.get(claim.deployment, 0), max(0, self.free_bytes)
        holder = self._held_by_others(claim) if holder is None else holder
        fence, coordinator = (None, NodeId("")) if holder is None else (holder.fence, holder.coordinator)
        return Refuse(claim.fence, claim.deployment, reason, message, promised, free, fence, coordinator)

    def _check_shape(self, claim: Claim) -> None:
        if not is_fence(claim.fence) or len(claim.deployment) > DEPLOYMENT_CHARACTERS or len(claim.model) > 512:
            raise PeerError("a malformed claim")
        if claim.releases is not None and not is_fence(claim.releases):
            raise PeerError("a malformed claim")
        if claim.releases is not None and claim.releases.term >= claim.fence.term:
            raise PeerError("a claim in the place of a later run")
        old = self.held.get(claim.releases) if claim.releases is not None else None
        if old is not None and old.claim.deployment != claim.deployment:
            raise PeerError("a claim in the place of another deployment's run")
        if all(stage.node != self.node for stage in claim.stages):
            raise PeerError("a claim that uses nothing here")
        at = 0
        for index, stage in enumerate(claim.stages):
            if stage.stage != index or stage.first != at or stage.last <= at:
                raise PeerError("a claim whose slices do not follow each other")
            # No stage runs in nothing: such claims would cost nobody anything, and RUNS_HELD of them keep others out.
            least = max(1, stage.weight_bytes + stage.kv_bytes)
            if min(stage.weight_bytes, stage.kv_bytes) < 0 or stage.reserved_bytes < least:
                raise PeerError("a claim that reserves less than it loads")
            at = stage.last
        if at != claim.layers:
            raise PeerError("a claim that does not cover the layers of its model")


_LOADED = ("ready", "connected")
