"""A participant's side: this node's memory and the only judge of it.

Invariant: the reserved bytes of all held runs never exceed the capacity, `promised` never goes back, and an order is
obeyed only for a held run, by exact (term, run), from the coordinator that claimed it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from meshnode.errors import ConfigError, PeerError, StaleFence
from meshnode.identity.ids import NodeId
from meshnode.wire.fence import Fence, is_fence
from meshnode.wire.messages import Claim, ClaimedStage, Connected, Failed, Grant, Prepare, Progress, Ready, Refuse

TERM_JUMP = 1000
"""A claim further above `promised` than this is refused: a liar must not use up the terms."""
DEPLOYMENT_CHARACTERS = 16
"""8 random bytes in hexadecimal."""
DEPLOYMENTS = 2048
"""Deployments with a promised term: years of daily starts of a node that serves. 26 bytes each at most, together 53 KB:
the disk keeps 64 KiB."""
RUNS_HELD = 64
"""Runs on one node; each holds memory, so this only bounds the bookkeeping of empty ones."""


@dataclass
class HeldRun:
    """A run this node granted: what was claimed, and how far its stages here are."""

    claim: Claim
    progress: dict[int, Progress] = field(default_factory=dict)
    states: dict[int, str] = field(default_factory=dict)
    committed: bool = False

    def own(self, node: NodeId) -> list[ClaimedStage]:
        """The stages that `node` runs."""
        return [stage for stage in self.claim.stages if stage.node == node]


@dataclass
class Ledger:
    """Everything that this node has promised and reserved."""

    node: NodeId
    capacity: int
    promised: dict[str, int] = field(default_factory=dict)
    held: dict[Fence, HeldRun] = field(default_factory=dict)
    refused: int = 0

    def claim(self, peer: NodeId, claim: Claim) -> Grant | Refuse:
        """Judge a claim. After a grant the ledger must be persisted before the answer is sent.

        Raises PeerError for a claim in another node's name or of impossible shape.
        """
        self._check_shape(peer, claim)
        known = self.held.get(claim.fence)
        if known is not None:
            if known.claim == claim:
                return Grant(claim.fence, claim.deployment)
            return self._refuse(claim, "equal_term", "another claim of the same term and run was granted")
        promised = self.promised.get(claim.deployment, 0)
        if claim.fence.term <= promised:
            return self._refuse(claim, "old_term", f"term {promised} was granted before")
        if claim.fence.term > promised + TERM_JUMP:
            return self._refuse(claim, "term_jump", "the term is too far ahead")
        for run in self.held.values():
            if run.claim.deployment == claim.deployment and run.claim.coordinator != peer:
                return self._refuse(claim, "held", "another coordinator holds this deployment here")
        if len(self.promised) >= DEPLOYMENTS and claim.deployment not in self.promised:
            return self._refuse(claim, "too_many", "too many deployments were granted here before")
        needed = sum(stage.reserved_bytes for stage in claim.stages if stage.node == self.node)
        if needed > self.free_bytes or len(self.held) >= RUNS_HELD:
            return self._refuse(claim, "no_room", f"{needed} bytes are claimed, {self.free_bytes} are free here")
        self.promised[claim.deployment] = claim.fence.term
        run = HeldRun(claim)
        run.states = {stage.stage: "claimed" for stage in run.own(self.node)}
        self.held[claim.fence] = run
        return Grant(claim.fence, claim.deployment)

    def authorize(self, peer: NodeId, fence: Fence) -> HeldRun:
        """The held run that `peer` may order about. Raises StaleFence otherwise, and counts it."""
        run = self.held.get(fence)
        if run is None or run.claim.coordinator != peer:
            self.refused += 1
            raise StaleFence(f"{fence} is not granted here to this coordinator")
        return run

    def prepare(self, peer: NodeId, order: Prepare) -> None:
        """Check an order against what was claimed. Raises StaleFence or PeerError."""
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

    def note(self, report: Progress | Ready | Connected | Failed) -> None:
        """Remember how far a stage of this node is, for the status snapshot."""
        run = self.held.get(report.fence)
        if run is None:
            return
        match report:
            case Progress():
                run.progress[report.stage] = report
                run.states[report.stage] = report.phase
            case Ready():
                run.states[report.stage] = "ready"
            case Connected():
                run.states[report.stage] = "connected"
            case Failed():
                run.states[report.stage] = "failed"

    def release(self, fence: Fence) -> HeldRun | None:
        """Forget a run and free what it reserved. Idempotent."""
        return self.held.pop(fence, None)

    def of_coordinator(self, peer: NodeId) -> list[Fence]:
        """The runs that `peer` coordinates here."""
        return [fence for fence, run in self.held.items() if run.claim.coordinator == peer]

    @property
    def reserved(self) -> dict[str, int]:
        """Bytes held here, by deployment."""
        sums: dict[str, int] = {}
        for run in self.held.values():
            own = sum(stage.reserved_bytes for stage in run.own(self.node))
            if own:
                sums[run.claim.deployment] = sums.get(run.claim.deployment, 0) + own
        return sums

    @property
    def free_bytes(self) -> int:
        """What another claim could still have."""
        return self.capacity - sum(self.reserved.values())

    def encode(self) -> bytes:
        """What must survive a restart: terms stay, reservations are void."""
        return msgspec.msgpack.encode(self.promised)

    def restore(self, data: bytes) -> None:
        """Take back what `encode` wrote. Raises ConfigError for a damaged file."""
        try:
            self.promised = msgspec.msgpack.decode(data, type=dict[str, int])
        except (msgspec.MsgspecError, ValueError) as error:
            raise ConfigError(
                f"the ledger in the data directory is damaged: {error}",
                "Delete the file `ledger` there while no other node of the mesh serves a model with this one.",
            ) from None

    def _refuse(self, claim: Claim, reason: str, message: str) -> Refuse:
        self.refused += 1
        promised = self.promised.get(claim.deployment, 0)
        return Refuse(claim.fence, claim.deployment, reason, message, promised, max(0, self.free_bytes))

    def _check_shape(self, peer: NodeId, claim: Claim) -> None:
        if claim.coordinator != peer:
            raise PeerError("a claim in another node's name")
        if not is_fence(claim.fence) or len(claim.deployment) > DEPLOYMENT_CHARACTERS or len(claim.model) > 512:
            raise PeerError("a malformed claim")
        if all(stage.node != self.node for stage in claim.stages):
            raise PeerError("a claim that uses nothing here")
        at = 0
        for index, stage in enumerate(claim.stages):
            if stage.stage != index or stage.first != at or stage.last <= at or stage.reserved_bytes < 0:
                raise PeerError("a claim whose slices do not follow each other")
            at = stage.last
        if at != claim.layers:
            raise PeerError("a claim that does not cover the layers of its model")
