"""This node's part in the demands of the mesh: says them, hears them, keeps them, and asks them of every claim.

Invariant: what is kept was signed by a member, and it is on disk before this node grants anything for it.
"""

from __future__ import annotations

import msgspec

from meshnode.core.coordination.demands import Demands, encode_demand, read
from meshnode.core.membership.announcement import Author
from meshnode.core.membership.digest import id_of
from meshnode.core.membership.membership import Membership
from meshnode.core.node import effects as do
from meshnode.core.node.outbox import Outbox
from meshnode.errors import PeerError
from meshnode.identity.domains import Domain
from meshnode.identity.ids import NodeId
from meshnode.wire.demand import Demand
from meshnode.wire.messages import Claim, DemandRecord

AGAIN_S = 1.0
"""For each member that may say it again before this one: what it says has arrived by then."""


LEFT_OUT = 256
"""Demands without room that are remembered: four times as many as there is room for."""


class Register:
    """All demands, as this node knows them."""

    def __init__(self, membership: Membership, out: Outbox) -> None:
        self._membership = membership
        self._out = out
        self._unwritten = False
        self._again_at: float | None = None
        self._left_out: dict[bytes, None] = {}
        """Ids of demands for which there was no room."""
        self.demands = Demands()

    def restore(self, data: bytes, unix: int) -> None:
        """Demands that were kept on disk. Raises ConfigError."""
        self.demands.restore(data, unix)
        for known in self.demands.ordered:
            self._membership.keep(known.record)

    def record(self, deployment: str) -> DemandRecord | None:
        """As it travels."""
        known = self.demands.known.get(deployment)
        return None if known is None else known.record

    def say(self, demand: Demand, now: float) -> Demand:
        """Sign a demand in this node's name and tell everybody; what counts of it from now on."""
        authority = self._membership.authority
        demand = msgspec.structs.replace(demand, author=self._membership.node)
        raw = encode_demand(demand)
        record = DemandRecord(demand.author, authority.chain, raw, authority.sign(Domain.DEMAND, raw))
        self._take(record, demand, set(), now)
        self.write()
        return self.demands.find(demand.deployment) or demand

    def remove(self, deployment: str, created: int, now: float) -> bool:
        """Nobody wants it any more; False where nobody did."""
        known = self.demands.find(deployment)
        if known is None or known.removed:
            return False
        gone = Demand(
            known.deployment,
            known.version + 1,
            known.author,
            known.manifest_digest,
            known.model,
            removed=True,
            created=created,
        )
        self.say(gone, now)
        return True

    def provable(self, deployment: str, now: float) -> DemandRecord | None:
        """Its record, in words that everybody can check today: certificates end, and authors are revoked."""
        known = self.demands.known.get(deployment)
        if known is None:
            return None
        if known.demand.author != self._membership.node and self._author(known.record) is None:
            self.say(msgspec.structs.replace(known.demand, version=known.demand.version + 1), now)
        return self.record(deployment)

    def revoked(self, now: float) -> None:
        """Somebody was revoked: what it said counts where it is known, and is to be said by another for everybody else.

        Soonest by the member with the lowest id that is there; but it may never have heard of it.
        """
        if any(self._membership.revocations.expelled(known.demand.author) for known in self.demands.ordered):
            roster, own = self._membership.roster, self._membership.node
            before = [n for n, entry in roster.entries.items() if n < own and entry.present and self._is_member(n)]
            at = now + AGAIN_S * len(before)
            self._again_at = at if self._again_at is None else min(at, self._again_at)

    def deadline(self) -> float | None:
        """When `settle` has something to do."""
        return self._again_at

    def settle(self, now: float) -> None:
        """Say again what a revoked author said, where nobody did."""
        if self._again_at is None or now < self._again_at:
            return
        self._again_at = None
        for known in self.demands.ordered:
            if self._membership.revocations.expelled(known.demand.author):
                self.say(msgspec.structs.replace(known.demand, version=known.demand.version + 1), now)

    def _is_member(self, node: NodeId) -> bool:
        author = self._membership.roster.authors.get(node)
        return author is not None and author.role == "member"

    def received(self, peer: NodeId, record: DemandRecord, now: float) -> Demand | None:
        """One of a linked peer; the demand where it is news. Raises PeerError for what no honest node sends."""
        if self._membership.digest.items.get(id_of(record)) is not None:
            return None
        author = self._author(record)
        if author is None:
            self._membership.gossip.saw(id_of(record))  # nothing that its bringer could help
            return None
        demand = read(record, author, verify=self._membership.rules.signatures)
        if not self._take(record, demand, {peer}, now):
            self._membership.gossip.saw(id_of(record))
            return None
        return demand

    def refusal(self, peer: NodeId, claim: Claim, now: float) -> tuple[str, str] | None:
        """Why a claim does not answer what is wanted: reason and text. Learns the demand that it carries."""
        told = None
        if claim.demand is not None:
            try:
                self.received(peer, claim.demand, now)
                told = msgspec.msgpack.decode(claim.demand.body, type=Demand)
            except (PeerError, msgspec.MsgspecError, ValueError) as error:
                return "bad_demand", f"the demand of the claim is not valid: {error}"
            if (told.deployment, told.manifest_digest) != (claim.deployment, claim.manifest_digest):
                return "bad_demand", "the claim is not for what its demand asks for"
        known = self.demands.find(claim.deployment)
        if known is None:
            return None if told is None else ("bad_demand", "nobody here knows who asked for it")
        if known.removed:
            return "not_wanted", "the model was unloaded"
        if known.manifest_digest != claim.manifest_digest:
            return "other_model", "this deployment is wanted with another manifest"
        if told is not None and told.version < known.version:
            return "old_demand", "a later demand for this deployment is known here"
        return None

    def write(self) -> None:
        """Have what is not on disk yet written before anything that follows."""
        if self._unwritten:
            self._unwritten = False
            self._out.do(do.KeepDemands(self.demands.encode()))

    def _take(self, record: DemandRecord, demand: Demand, told: set[NodeId], now: float) -> bool:
        merged = self.demands.offer(record, demand)
        for each in merged.gone:
            self._membership.let_go(each)
        if merged.news:
            self._membership.hold(record, None, told, now)
        self._unwritten = self._unwritten or merged.news or bool(merged.gone)
        self._leave_out([id_of(each) for each in merged.cut])
        return merged.news

    def _leave_out(self, cut: list[bytes]) -> None:
        """Where there is room again, what was left out is asked for again if anybody has it: it may have come before
        the removal that makes room, and others heard the two the other way round."""
        if cut:
            self._left_out.update(dict.fromkeys(cut))
            self._left_out = dict(list(self._left_out.items())[-LEFT_OUT:])
        elif self._left_out and not self.demands.full:
            for identity in self._left_out:
                self._membership.gossip.forgot(identity)
            self._left_out.clear()

    def _author(self, record: DemandRecord) -> Author | None:
        """Who signed it, if that is a member today: by its present certificate where it is met, else by that which
        came along."""
        author: Author | None = self._membership.roster.authors.get(record.author)
        if author is None:
            own = self._membership.authority
            try:
                author = own.admit(own.chain if record.author == own.node else record.chain)
            except PeerError:
                return None
        if author.role != "member" or author.node != record.author:
            return None
        return None if self._membership.revocations.bars(author.node, author) else author
