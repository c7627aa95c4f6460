"""A participant's part of the mediator: claims, orders, leases and stages of this node.

Invariant: what the ledger does not hold runs nowhere on this node: whatever leaves the ledger is stopped at once, or
becomes a stage of the run that took its place.
"""

from __future__ import annotations

from typing import assert_never

from meshnode.core.coordination.ledger import Ledger, Report
from meshnode.core.membership.membership import Membership
from meshnode.core.node import effects as do
from meshnode.core.node.outbox import Outbox
from meshnode.core.node.register import Register
from meshnode.errors import PeerError
from meshnode.identity.ids import NodeId
from meshnode.wire.fence import Fence
from meshnode.wire.messages import (
    Abort,
    Claim,
    Commit,
    Committed,
    Connect,
    FenceOff,
    Grant,
    Prepare,
    Refuse,
    Renew,
    Renewed,
)

SILENT_S = 2.0
"""Without a word of its holder a run does not keep others from claiming (COORDINATION)."""

Ordered = Claim | Prepare | Connect | Commit | FenceOff | Renew | Abort


def is_silent(membership: Membership, node: NodeId, now: float) -> bool:
    """This node's own evidence: no link to `node`, or nothing heard on it for too long."""
    if node == membership.node:
        return False
    link = membership.links.links.get(node)
    return link is None or not link.up or now - link.heard_at > SILENT_S


class Participant:
    """What this node does for coordinators, itself among them."""

    def __init__(self, membership: Membership, ledger: Ledger, register: Register, out: Outbox) -> None:
        self._membership = membership
        self._register = register
        self._out = out
        self._rules = ledger.rules
        self.ledger = ledger

    def ordered(self, peer: NodeId, message: Ordered, now: float) -> None:
        """One order. Raises StaleFence, PeerError."""
        match message:
            case Claim():
                self._claimed(peer, message, now)
            case Prepare():
                self._prepare(peer, message, now)
            case Connect():
                self.ledger.authorize(peer, message.fence)
                self._out.do(do.ConnectStages(message.fence))
            case Commit():
                self.ledger.commit(peer, message.fence)
                self._persist()
                self._out.send(peer, Committed(message.fence))
            case FenceOff():
                below = self.ledger.fence(peer, message)
                self._persist()
                for fence in below:
                    self.release(fence, now)
            case Renew():
                held = self.ledger.renew(peer, message.fence, now)
                if held:
                    self._out.do(do.RenewStages(message.fence))
                self._out.send(peer, Renewed(message.fence, message.number, held))
            case Abort():
                if message.fence in self.ledger.held:
                    self.ledger.authorize(peer, message.fence)
                    self.release(message.fence, now)
            case _:
                assert_never(message)

    def expire(self, now: float) -> None:
        """Free what nobody renewed; before anything else that happens at `now`."""
        for fence in self.ledger.ended(now):
            self._out.trace(f"{fence}: its lease ended")
            self.release(fence, now)

    def reported(self, report: Report) -> None:
        """A stage of this node said something: its coordinator hears of it."""
        run = self.ledger.held.get(report.fence)
        if run is not None:
            self.ledger.note(report)
            self._out.send(run.claim.coordinator, report)

    def release(self, fence: Fence, now: float, kept: tuple[do.Kept, ...] = ()) -> None:
        """Forget a run and stop its stages, but those that another run keeps."""
        if self.ledger.release(fence) is not None:
            self._out.do(do.StopStages(fence, kept))
            self._membership.voice.soon(now)

    def gone(self, peer: NodeId, now: float) -> None:
        """`peer` was revoked: what it coordinated here ends now."""
        for fence in self.ledger.of_coordinator(peer):
            self.release(fence, now)

    def repeat_grants(self, peer: NodeId) -> None:
        """An Abort may have been lost with a link: a coordinator that no longer knows a run says it again.

        The first Persist may have failed (a full disk): a grant is never repeated that is not durable.
        """
        held = self.ledger.of_coordinator(peer)
        if held:
            self._persist()
        for fence in held:
            self._out.send(peer, Grant(fence, self.ledger.held[fence].claim.deployment))

    def _claimed(self, peer: NodeId, claim: Claim, now: float) -> None:
        author = self._membership.roster.authors.get(peer)
        if peer != self._membership.node and (author is None or author.role != "member"):
            raise PeerError("only members may claim")
        if self._rules.signed_claim and claim.coordinator != peer:
            raise PeerError("a claim in another node's name")
        answer, superseded = self._judged(peer, claim, now)
        self._register.write()
        if isinstance(answer, Grant) and self._rules.persisted_grant:
            self._persist()
        for fence in superseded:
            self.release(fence, now)
        self._out.trace(f"claim of {claim.fence} for {claim.model}: {type(answer).__name__.lower()}")
        self._out.send(peer, answer)
        if isinstance(answer, Refuse):
            self.repeat_grants(peer)  # it may be a run of its own, forgotten there, that is in the way
        self._membership.voice.soon(now)

    def _judged(self, peer: NodeId, claim: Claim, now: float) -> tuple[Grant | Refuse, list[Fence]]:
        if any(self._membership.revocations.expelled(stage.node) for stage in claim.stages):
            return self.ledger.refuse(claim, "revoked", "a node of that plan was revoked from the mesh"), []
        refusal = self._register.refusal(peer, claim, now)
        if refusal is not None:
            return self.ledger.refuse(claim, *refusal), []
        return self.ledger.claim(claim, now, lambda holder: self.lost(holder, now))

    def _prepare(self, peer: NodeId, order: Prepare, now: float) -> None:
        claimed = self.ledger.prepare(peer, order)
        old = self.ledger.displaced(order.fence)
        if old is not None and not order.hold:
            adopted = self.ledger.adopted(old, order.fence)
            self.release(old, now, tuple(do.Kept(before, order.fence, after) for before, after in adopted.items()))
        self._out.do(do.PrepareStage(order, claimed.reserved_bytes))

    def lost(self, holder: NodeId, now: float) -> bool:
        """This node's own evidence that a holder is gone."""
        return is_silent(self._membership, holder, now)

    def _persist(self) -> None:
        self._out.do(do.Persist(self.ledger.encode()))
