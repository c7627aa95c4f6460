"""The mediator of one node: every event goes in here, every decision comes out as an effect.

Invariant: the same events at the same times give the same effects; nothing here reads a clock, draws a random number
of its own, or touches anything outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import assert_never

import msgspec

from meshnode.core.coordination.ledger import Ledger
from meshnode.core.coordination.rules import COORDINATION_RULES, CoordinationRules
from meshnode.core.membership import orders as member
from meshnode.core.membership.announcement import COORDINATED, Authority, Body, Speed, Way
from meshnode.core.membership.gossip import SMALL
from meshnode.core.membership.membership import Membership
from meshnode.core.membership.rules import RULES, Rules
from meshnode.core.node import announcing
from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.core.node.coordinator import Books, Coordinator, Offers
from meshnode.core.node.offers import inventory_of
from meshnode.core.node.outbox import Outbox
from meshnode.core.node.participant import Participant
from meshnode.core.node.register import Register
from meshnode.core.node.successor import Successor
from meshnode.core.planning.inventory import Inventory
from meshnode.errors import PeerError, StaleFence
from meshnode.identity.ids import NodeId, short
from meshnode.wire.demand import Demand
from meshnode.wire.fence import Fence
from meshnode.wire.messages import (
    Abort,
    AnyMessage,
    Claim,
    Commit,
    Committed,
    Connect,
    Connected,
    DemandRecord,
    Drain,
    Failed,
    FenceOff,
    Fetched,
    Grant,
    Have,
    Leave,
    Ping,
    Pong,
    Prepare,
    Progress,
    Ready,
    Refuse,
    Renew,
    Renewed,
    Unknown,
    Want,
)


@dataclass(frozen=True)
class NodeRules:
    """What the simulator may switch off."""

    membership: Rules = RULES
    coordination: CoordinationRules = COORDINATION_RULES


Found = on.CacheChanged | on.AddressesChanged | on.CertificateRenewed | on.Measured
"""What a node finds out about itself."""

Asked = on.Demanded | on.Withdrawn | on.ModelOpened | on.ModelNotOpened
"""What concerns a demand."""

NODE_RULES = NodeRules()
"""Those of a node: all of them."""


@dataclass(frozen=True)
class Self:
    """What this node says of itself; while it runs, only its addresses change."""

    name: str
    role: str
    addresses: tuple[str, ...]
    memory_usable: int
    incarnation: int
    cores: int = 0
    software: str = ""
    llama: str = ""
    startup_timeout_s: float = 600.0
    """Since the last progress of any stage (COORDINATION): a slow disk reads a slice for minutes."""


class Mediator:
    """One node's mind. Not thread-safe; owned by the runtime's loop."""

    def __init__(
        self, me: Self, authority: Authority, draw: Callable[[int], bytes], now: float, rules: NodeRules = NODE_RULES
    ) -> None:
        self.me = me
        self.authority = authority
        self.node = authority.node
        self.started_at = now
        self.membership = Membership(authority, me.incarnation, draw, now, rules.membership)
        self.roster = self.membership.roster
        self.links = self.membership.links
        self.hints = self.membership.hints
        self.ledger = Ledger(self.node, me.memory_usable, rules.coordination)
        self.out = Outbox(self.membership)
        self.register = Register(self.membership, self.out)
        self.participant = Participant(self.membership, self.ledger, self.register, self.out)
        books, offers = Books(self.ledger, self.register), Offers(self.inventory, self._sources)
        self.coordinator = Coordinator(me.startup_timeout_s, self.membership, books, self.out, offers, draw)
        self.deployments = self.coordinator.deployments
        self.cached: dict[str, tuple[tuple[int, int], ...]] = {}
        self.successor = Successor(self.membership, books, self.coordinator, self.out, lambda: self.cached, draw)
        self.counters = {"refused_messages": 0, "stale_orders": 0}
        self.speeds: dict[str, Speed] = {}
        self.ways: dict[NodeId, Way] = {}
        self.draining = False
        self.stopping = False
        self._linked_for: object = None
        """What the partners that links are kept to were worked out from."""

    def handle(self, event: on.Event, now: float) -> list[do.Effect]:
        """Take one event; the effects are to be done in their order, before the next event is handed in."""
        # A node that slept takes nobody for silent whose words it has yet to read, and must not obey, or order,
        # anything for a run whose lease ended meanwhile.
        self.membership.awoke(now)
        if self.ledger.held:
            self.participant.expire(now)
        if self.deployments:
            self.coordinator.expire(now)
        self._dispatch(event, now)
        self._settle(now)
        self.register.write()
        return self.out.take()

    def deadline(self) -> float | None:
        """When to hand in TimePassed at the latest; None when nothing is due ever again."""
        if self.stopping:
            return None
        due = min(self.membership.deadline(), self.membership.voice.due_at)
        leases = self.ledger.deadline() if self.ledger.held else None
        runs = self.coordinator.deadline() if self.deployments else None
        for at in (leases, runs, self.register.deadline(), self.successor.deadline()):
            if at is not None and at < due:
                due = at
        return due

    def coordinates(self, fence: Fence) -> bool:
        """Whether this node coordinates the run of `fence`."""
        return self.coordinator.of(fence) is not None

    # --- events ---------------------------------------------------------------------------------------------

    def _dispatch(self, event: on.Event, now: float) -> None:
        match event:  # what comes most often first
            case on.Received():
                self._received(event.peer, event.message, now)
            case on.TimePassed():
                pass
            case on.PeerFound():
                self.membership.found(event.node, event.addresses, now)
            case on.LinkOpened():
                self._link_opened(event.peer, now)
            case on.LinkClosed():
                self._link_closed(event, now)
            case on.Revoked():
                self.membership.revoke(self.node, event.record, now)
            case on.Demanded() | on.Withdrawn() | on.ModelOpened() | on.ModelNotOpened():
                self._asked(event, now)
            case on.Planned() | on.PlanFailed():
                self.coordinator.planned(event, now)
            case on.StageReported():
                self.participant.reported(event.report)
            case on.HeadOpened() | on.HeadDrained() | on.HeadFailed():
                self.coordinator.head_reported(event, now)
            case on.CacheChanged() | on.AddressesChanged() | on.CertificateRenewed() | on.Measured():
                self._found_out(event, now)
            case on.DrainWanted():
                self.out.send(event.node, Drain(event.draining))
            case on.Stopping():
                self._stop(now)

    def _asked(self, event: Asked, now: float) -> None:
        """What somebody wants, or wants no more, and what this node could do for it."""
        match event:
            case on.Demanded():
                self._demanded(event, now)
            case on.Withdrawn():
                self.coordinator.withdraw(event.deployment, "withdrawn", now)  # nothing goes on while the disk is slow
                self.register.remove(event.deployment, event.created, now)
            case on.ModelOpened():
                self.successor.opened(event, now)
            case on.ModelNotOpened():
                self.successor.not_opened(event, now)
            case _:
                assert_never(event)

    def _demanded(self, event: on.Demanded, now: float) -> None:
        """A new demand, or one that was known before and that somebody else may care for by now."""
        known = self.register.demands.find(event.demand.deployment)
        if known is None:
            demand = self.register.say(msgspec.structs.replace(event.demand, created=event.created), now)
            self.coordinator.demanded(replace(event, demand=demand), now)
        elif known.deployment in self.deployments:
            self.deployments[known.deployment].has_file = True
        elif not known.removed and not self.successor.cared_for(known.deployment, now):
            self.coordinator.demanded(replace(event, demand=known), now)

    def _found_out(self, event: Found, now: float) -> None:
        """Something about this node itself, which its announcement tells."""
        match event:
            case on.Measured():
                known = self.speeds.keys() == event.speeds.keys()
                self.speeds, self.ways = event.speeds, event.ways
                if known:
                    return  # these figures ride on the refresh
            case on.CacheChanged():
                self.cached = event.cached
            case on.AddressesChanged():
                self.me = replace(self.me, addresses=event.addresses)
            case on.CertificateRenewed():
                pass
            case _:
                assert_never(event)
        self._announce_soon(now)

    def _link_opened(self, peer: NodeId, now: float) -> None:
        if self.links.up(peer):  # both ends dialed: what was on its way over the other link may be lost
            self.coordinator.unlinked(peer, f"the link to {self.name_of(peer)} was replaced", now)
        self.membership.link_opened(peer, now)
        if self.membership.barred(peer):
            return  # it is being closed, and nothing may be planned with it
        self.out.linked(peer)
        self.coordinator.changed(now)
        self.successor.changed()
        self.participant.repeat_grants(peer)

    def _link_closed(self, event: on.LinkClosed, now: float) -> None:
        peer = event.peer
        self.out.unlinked(peer)
        if self.membership.link_closed(peer, event.reason, now, barred=event.barred):
            self.coordinator.unlinked(peer, f"the link to {self.name_of(peer)} was lost", now)

    def _received(self, peer: NodeId, message: AnyMessage, now: float) -> None:
        self.links.heard(peer, now)
        if self.membership.barred(peer):
            return  # its link is being closed
        try:
            self._message(peer, message, now)
        except StaleFence:
            self.counters["stale_orders"] += 1
        except PeerError as error:
            self.counters["refused_messages"] += 1
            self.out.do(do.CloseLink(peer, str(error)))

    def _message(self, peer: NodeId, message: AnyMessage, now: float) -> None:
        match message:
            case Ping() | Pong() | Have() | Want():  # nearly all that comes: four looks, not twenty
                self.membership.received(peer, message, now)
            case Claim() | Prepare() | Connect() | Commit() | FenceOff() | Renew() | Abort():
                self.participant.ordered(peer, message, now)
            case (
                Grant() | Refuse() | Committed() | Renewed() | Progress() | Fetched() | Ready() | Connected() | Failed()
            ):
                self.coordinator.answered(peer, message, now)
            case DemandRecord():
                news = self.register.received(peer, message, now)
                if news is not None and news.deployment in self.deployments:
                    self._revised(news, now)
            case Drain():
                self._drain(peer, message.draining, now)
            case Unknown():
                pass
            case _:
                self.membership.received(peer, message, now)

    def _revised(self, demand: Demand, now: float) -> None:
        """Somebody said something else about what this node cares for."""
        if demand.removed:
            self.coordinator.withdraw(demand.deployment, "withdrawn", now)
        else:
            self.coordinator.revised(demand, now)

    def _drain(self, peer: NodeId, draining: bool, now: float) -> None:
        author = self.roster.authors.get(peer)
        if peer != self.node and (author is None or author.role != "member"):
            raise PeerError("only members may ask a node to take no more work")
        if draining != self.draining:
            self.draining = draining
            self._announce_soon(now)
            # Its own plans; the others hear of it by the announcement.
            self.coordinator.changed(now, (self.node,) if draining else ())

    def _follow(self, now: float) -> None:
        """Do what membership asked for."""
        for order in self.membership.take():
            match order:
                case member.Tell():
                    self.out.do(do.Send(order.peer, order.message))
                case member.Dial():
                    self.out.do(do.Dial(order.node, self.addresses_of(order.node)))
                case member.Drop():
                    self.out.do(do.CloseLink(order.peer, order.reason))
                case member.Lost():
                    self._lost(order.node, order.reason, now)
                case member.Changed():
                    self.coordinator.changed(now)
                    self.successor.changed()
                case member.Keep():
                    self.out.do(do.KeepRevocations(order.revocations))
                    self.register.revoked(now)
                case member.Noted():
                    self.out.trace(order.text)
                case _:
                    assert_never(order)

    def _lost(self, peer: NodeId, reason: str, now: float) -> None:
        """Its runs here wait for a successor as long as their lease lasts, unless it is no member any more."""
        self.coordinator.lost(peer, reason, now)
        self.successor.changed()
        entry = self.roster.entries.get(peer)
        if entry is None or self.membership.barred(peer):
            self.participant.gone(peer, now)

    # --- every time -------------------------------------------------------------------------------------------

    def _settle(self, now: float) -> None:
        """What follows from any event: messages to this node itself, dials, pings, plans, deadlines."""
        if self.out.local:
            self._listen(now)
        self._follow(now)
        if self.stopping:
            return
        if self.membership.voice.due_at <= now:
            self.membership.speak(self._body(), now)
        self._keep_links()
        self.membership.settle(now)
        self._follow(now)
        self.register.settle(now)
        self.successor.settle(now)
        if self.deployments:
            self.coordinator.settle(now)
        if self.out.local:
            self._settle(now)

    def _listen(self, now: float) -> None:
        """Take what this node said to itself."""
        while self.out.local:
            self._received(self.node, self.out.local.popleft(), now)

    def inventory(self, deployment: str, kind: str = "") -> Inventory:
        """Every member as the planner may use it for `deployment`, whose weights are of `kind`."""
        return inventory_of(self, deployment, kind)

    def _sources(self, digest: str) -> tuple[NodeId, ...]:
        """Nodes that have bytes of the model `digest`, by their word; who has most first."""
        told = {node: entry.body.cached for node, entry in self.roster.entries.items() if self.reachable(node)}
        told[self.node] = self.cached
        sizes = {node: sum(last - first for first, last in cached.get(digest, ())) for node, cached in told.items()}
        return tuple(sorted((node for node in sizes if sizes[node]), key=lambda node: (-sizes[node], node)))

    def _announce_soon(self, now: float) -> None:
        self.membership.voice.soon(now)

    def _keep_links(self) -> None:
        """To the members in every run that this node takes part in, whatever the mesh's size.

        Most events change nothing of it: whom it names is worked out again only when one of its sources differs.
        """
        changes = (self.ledger.changes, self.roster.changes, self.membership.revocations.changes)
        wanted = self.coordinator.partners() if self.deployments else None
        sources = (changes, wanted, self.successor.partners, self.out.awaited)
        if sources != self._linked_for:
            self._linked_for = sources
            self.membership.keep_links_to(self._partners())

    def _partners(self) -> frozenset[NodeId]:
        """A claim may name nodes that nobody knows: they are dialed when they have announced themselves."""
        held = [run.claim for run in self.ledger.held.values()]
        found = {stage.node for claim in held for stage in claim.stages} | {claim.coordinator for claim in held}
        found |= self.coordinator.partners() | self.successor.partners | self.out.awaited
        return frozenset(node for node, entry in self.roster.entries.items() if node in found and not entry.left)

    def _body(self) -> Body:
        body = Body(
            mesh=self.authority.mesh,
            node=self.node,
            incarnation=self.me.incarnation,
            sequence=0,
            name=self.me.name,
            addresses=self.me.addresses,
            memory_usable=self.me.memory_usable,
            software=self.me.software,
            llama=self.me.llama,
            reserved=announcing.reserved(self.ledger.reserved),
            served=announcing.served(self.deployments.values()),
            cached=announcing.cached(self.cached),
            left=self.stopping,
            cores=self.me.cores,
            speeds=announcing.speeds(self.speeds),
            ways=announcing.ways(self.ways),
            draining=self.draining,
            coordinates=() if self.stopping else self._cared_for(),
        )
        return announcing.fitting(body)

    def _cared_for(self) -> tuple[str, ...]:
        return (*self.coordinator.cared_for(), *self.successor.opening())[:COORDINATED]

    def _stop(self, now: float) -> None:
        self.coordinator.leave(now)
        self._listen(now)
        for fence in list(self.ledger.held):
            self.participant.release(fence, now)
        self.stopping = True
        self.membership.speak(self._body(), now)
        self._follow(now)
        for peer in self.links.linked():
            self.out.do(do.Send(peer, Leave()))

    # --- small -------------------------------------------------------------------------------------------------

    def reachable(self, node: NodeId) -> bool:
        """Whether work can be given to `node`: linked up to 16 nodes; above, alive by its observers' word."""
        if self.membership.standing.size <= SMALL:
            return self.links.up(node)
        entry = self.roster.entries.get(node)
        return entry is not None and entry.present

    def addresses_of(self, node: NodeId) -> tuple[str, ...]:
        """Where `node` can be dialed; this node too, by its own stages and heads."""
        if node == self.node:
            return self.me.addresses
        return self.membership.addresses_of(node)

    def name_of(self, node: NodeId) -> str:
        """What a person called this node."""
        if node == self.node:
            return self.me.name
        body = self.roster.body(node)
        return body.name if body is not None else short(node)
