"""The mediator of one node: every event goes in here, every decision comes out as an effect.

Invariant: the same events at the same times give the same effects; nothing here reads a clock, draws a random number
of its own, or touches anything outside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import assert_never

from meshnode.core.coordination.ledger import Ledger
from meshnode.core.coordination.run import CloseHead as HeadEnds
from meshnode.core.coordination.run import Ended, Order, RunOrder, State
from meshnode.core.coordination.run import OpenHead as HeadBegins
from meshnode.core.membership import orders as member
from meshnode.core.membership.announcement import Authority, Body
from meshnode.core.membership.gossip import SMALL
from meshnode.core.membership.membership import Membership
from meshnode.core.membership.rules import RULES, Rules
from meshnode.core.node import announcing
from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.core.node.deployments import Deployment, without_this
from meshnode.core.planning.inventory import NodeInventory
from meshnode.errors import PeerError, StaleFence
from meshnode.identity.ids import NodeId, short
from meshnode.wire.fence import Fence
from meshnode.wire.messages import (
    Abort,
    AnyMessage,
    Claim,
    Commit,
    Connect,
    Connected,
    Failed,
    Grant,
    Leave,
    Prepare,
    Progress,
    Ready,
    Refuse,
    Unknown,
)

REPEAT_S = 20.0
"""A participant says so often what it granted: an Abort, or the Grant itself, may have been lost with a link."""
UNSENT = 64
"""Messages that wait for a link to a partner above 16 nodes: an order and its answers for every stage it may hold."""


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


class Mediator:
    """One node's mind. Not thread-safe; owned by the runtime's loop."""

    def __init__(
        self, me: Self, authority: Authority, draw: Callable[[int], bytes], now: float, rules: Rules = RULES
    ) -> None:
        self.me = me
        self.authority = authority
        self.node = authority.node
        self.draw = draw
        self.started_at = now
        self.membership = Membership(authority, me.incarnation, draw, now, rules)
        self.roster = self.membership.roster
        self.links = self.membership.links
        self.hints = self.membership.hints
        self.ledger = Ledger(self.node, me.memory_usable)
        self.deployments: dict[str, Deployment] = {}
        self.cached: dict[str, tuple[tuple[int, int], ...]] = {}
        self.counters = {"refused_messages": 0, "stale_orders": 0}
        self.stopping = False
        self._repeat_at: float | None = None
        self._unsent: dict[NodeId, deque[AnyMessage]] = {}
        self._effects: list[do.Effect] = []
        self._local: deque[AnyMessage] = deque()

    def handle(self, event: on.Event, now: float) -> list[do.Effect]:
        """Take one event; the effects are to be done in their order, before the next event is handed in."""
        self._effects = []
        self._dispatch(event, now)
        self._settle(now)
        return self._effects

    def deadline(self) -> float | None:
        """When to hand in TimePassed at the latest; None when nothing is due ever again."""
        if self.stopping:
            return None
        due = min(self.membership.deadline(), self.membership.voice.due_at)
        times = [self._repeat_at]
        for deployment in self.deployments.values():
            times += [deployment.plan_at, deployment.run.deadline if deployment.run else None]
        return min((at for at in times if at is not None and at < due), default=due)

    def run_of(self, fence: Fence) -> Deployment | None:
        """The deployment of this coordinator whose present run has `fence`."""
        return next((d for d in self.deployments.values() if d.run is not None and d.run.fence == fence), None)

    # --- events ---------------------------------------------------------------------------------------------

    def _dispatch(self, event: on.Event, now: float) -> None:
        match event:
            case on.PeerFound():
                self.membership.found(event.node, event.addresses, now)
            case on.LinkOpened():
                self._link_opened(event.peer, now)
            case on.LinkClosed():
                self._link_closed(event, now)
            case on.Received():
                self._received(event.peer, event.message, now)
            case on.Revoked():
                self.membership.revoke(self.node, event.record, now)
            case on.Demanded():
                key = event.demand.deployment
                term = self.ledger.promised.get(key, 0)
                self.deployments[key] = Deployment(event.demand, event.footprint, event.created, now, term=term)
            case on.Withdrawn():
                self._withdraw(event.deployment, "withdrawn", now)
            case on.Planned() | on.PlanFailed():
                self._planned(event, now)
            case on.StageReported():
                self._stage_reported(event.report, now)
            case on.HeadOpened() | on.HeadFailed():
                self._head_reported(event, now)
            case on.CacheChanged() | on.AddressesChanged() | on.CertificateRenewed():
                self._changed(event, now)
            case on.Stopping():
                self._stop(now)
            case on.TimePassed():
                pass

    def _changed(self, event: on.CacheChanged | on.AddressesChanged | on.CertificateRenewed, now: float) -> None:
        """Something that this node says of itself."""
        if isinstance(event, on.CacheChanged):
            self.cached = event.cached
        elif isinstance(event, on.AddressesChanged):
            self.me = replace(self.me, addresses=event.addresses)
        self._announce_soon(now)

    def _link_opened(self, peer: NodeId, now: float) -> None:
        self.membership.link_opened(peer, now)
        for message in self._unsent.pop(peer, ()):
            self._do(do.Send(peer, message))
        for deployment in self.deployments.values():
            deployment.changed(now)
        self._repeat_grants(peer)

    def _repeat_grants(self, peer: NodeId) -> None:
        """An Abort may have been lost with a link: a coordinator that no longer knows a run says it again.

        The first Persist may have failed (a full disk): a grant is never repeated that is not durable.
        """
        held = self.ledger.of_coordinator(peer)
        if held:
            self._do(do.Persist(self.ledger.encode()))
        for fence in held:
            self._send(peer, Grant(fence, self.ledger.held[fence].claim.deployment))

    def _link_closed(self, event: on.LinkClosed, now: float) -> None:
        """Orders and reports may have been lost with the link: a run that does not serve yet starts over."""
        peer = event.peer
        self._unsent.pop(peer, None)
        if not self.membership.link_closed(peer, event.reason, now, barred=event.barred):
            return
        for deployment in self.deployments.values():
            if deployment.run is not None and deployment.run.state is not State.SERVING:
                self._obey(deployment, deployment.run.lost(peer, f"the link to {self.name_of(peer)} was lost"), now)

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
            self._do(do.CloseLink(peer, str(error)))

    def _message(self, peer: NodeId, message: AnyMessage, now: float) -> None:
        match message:
            case Claim() | Prepare() | Connect() | Commit() | Abort():
                self._ordered(peer, message, now)
            case Grant() | Refuse() | Progress() | Ready() | Connected() | Failed():
                self._answered(peer, message, now)
            case Unknown():
                pass
            case _:
                self.membership.received(peer, message, now)

    def _follow(self, now: float) -> None:
        """Do what membership asked for."""
        for order in self.membership.take():
            match order:
                case member.Tell():
                    self._do(do.Send(order.peer, order.message))
                case member.Dial():
                    self._do(do.Dial(order.node, self.addresses_of(order.node)))
                case member.Drop():
                    self._do(do.CloseLink(order.peer, order.reason))
                case member.Lost():
                    self._lost(order.node, order.reason, now)
                case member.Changed():
                    for deployment in self.deployments.values():
                        deployment.changed(now)
                case member.Keep():
                    self._do(do.KeepRevocations(order.revocations))
                case member.Noted():
                    self._trace(order.text)
                case _:
                    assert_never(order)

    # --- a participant's part ---------------------------------------------------------------------------------

    def _ordered(self, peer: NodeId, message: Claim | Prepare | Connect | Commit | Abort, now: float) -> None:
        match message:
            case Claim():
                self._require_member(peer)
                answer = self._judged(peer, message)
                if isinstance(answer, Grant):
                    self._do(do.Persist(self.ledger.encode()))
                self._trace(f"claim of {message.fence} for {message.model}: {type(answer).__name__.lower()}")
                self._send(peer, answer)
                if isinstance(answer, Refuse):
                    self._repeat_grants(peer)  # it may be a run of its own, forgotten there, that is in the way
                self._announce_soon(now)
            case Prepare():
                self.ledger.prepare(peer, message)
                self._do(do.PrepareStage(message))
            case Connect():
                self.ledger.authorize(peer, message.fence)
                self._do(do.ConnectStages(message.fence))
            case Commit():
                self.ledger.authorize(peer, message.fence).committed = True
            case Abort():
                if message.fence in self.ledger.held:
                    self.ledger.authorize(peer, message.fence)
                    self._release(message.fence, now)
            case _:
                assert_never(message)

    def _judged(self, peer: NodeId, claim: Claim) -> Grant | Refuse:
        if any(self.membership.revocations.expelled(stage.node) for stage in claim.stages):
            return Refuse(claim.fence, claim.deployment, "revoked", "a node of that plan was revoked from the mesh")
        return self.ledger.claim(peer, claim)

    def _release(self, fence: Fence, now: float) -> None:
        if self.ledger.release(fence) is not None:
            self._do(do.StopStages(fence))
            self._announce_soon(now)

    def _stage_reported(self, report: Progress | Ready | Connected | Failed, now: float) -> None:
        run = self.ledger.held.get(report.fence)
        if run is None:
            return
        self.ledger.note(report)
        self._send(run.claim.coordinator, report)

    # --- a coordinator's part ---------------------------------------------------------------------------------

    def _answered(
        self, peer: NodeId, message: Grant | Refuse | Progress | Ready | Connected | Failed, now: float
    ) -> None:
        deployment = self.run_of(message.fence)
        if deployment is None or deployment.run is None:
            self._send(peer, Abort(message.fence, "unknown"))
            return
        self._obey(deployment, deployment.run.received(peer, message, now), now)

    def _head_reported(self, event: on.HeadOpened | on.HeadFailed, now: float) -> None:
        deployment = self.run_of(event.fence)
        if deployment is None or deployment.run is None:
            return
        if isinstance(event, on.HeadOpened):
            self._obey(deployment, deployment.run.head_opened(now), now)
            self.membership.voice.soon(now, settle=0.0)  # clients of every node wait for this one
        else:
            self._obey(deployment, deployment.run.end("stage_lost", event.message), now)

    def _planned(self, event: on.Planned | on.PlanFailed, now: float) -> None:
        deployment = self.deployments.get(event.deployment)
        if deployment is None:
            return
        if isinstance(event, on.PlanFailed):
            deployment.plan_failed(event.serial, event.message, now)
            return
        run = deployment.planned(event.serial, event.outcome, self.draw, now)
        if run is None:
            self._trace(f"no plan for {deployment.demand.model} yet")
            return
        self._trace(f"{run.fence}: claiming {len(run.claim.stages)} stages for {run.claim.model}")
        self._obey(deployment, run.start(now), now)

    def _obey(self, deployment: Deployment, orders: list[RunOrder], now: float) -> None:
        for order in orders:
            match order:
                case Order():
                    self._send(order.node, order.message)
                case HeadBegins():
                    assert deployment.run is not None
                    self._do(do.OpenHead(deployment.run.claim, deployment.run.hops, deployment.created))
                case HeadEnds():
                    self._do(do.CloseHead(order.fence))
                case Ended():
                    self._trace(f"{order.fence} ended: {order.reason}: {order.message}")
                    deployment.ended(order, now)
                    self._announce_soon(now)
                case _:
                    assert_never(order)

    def _withdraw(self, key: str, reason: str, now: float) -> None:
        deployment = self.deployments.pop(key, None)
        if deployment is not None and deployment.run is not None:
            self._obey(deployment, deployment.run.end(reason, "the model is no longer wanted"), now)

    def _lost(self, peer: NodeId, message: str, now: float) -> None:
        for deployment in list(self.deployments.values()):
            if deployment.run is not None:
                self._obey(deployment, deployment.run.lost(peer, message), now)
            deployment.changed(now)
        for fence in self.ledger.of_coordinator(peer):
            self._release(fence, now)

    # --- every time -------------------------------------------------------------------------------------------

    def _settle(self, now: float) -> None:
        """What follows from any event: messages to this node itself, dials, pings, plans, deadlines."""
        while self._local:
            self._received(self.node, self._local.popleft(), now)
        self._follow(now)
        if self.stopping:
            return
        if self.membership.voice.due_at <= now:
            self.membership.speak(self._body(), now)
        if self._repeat_at is not None and self._repeat_at <= now:
            for peer in sorted({held.claim.coordinator for held in self.ledger.held.values()} - {self.node}):
                self._repeat_grants(peer)
            self._repeat_at = None
        if self._repeat_at is None and self.ledger.held:
            self._repeat_at = now + REPEAT_S
        self.membership.keep_links_to(self._partners())
        self.membership.settle(now)
        self._follow(now)
        for deployment in list(self.deployments.values()):
            if deployment.run is not None:
                self._obey(deployment, deployment.run.expire(now), now)
            if deployment.due(now):
                self._make_plan(deployment, now)
        if self._local:
            self._settle(now)

    def _make_plan(self, deployment: Deployment, now: float) -> None:
        demand = deployment.demand
        inventory = deployment.view(self.inventory(demand.deployment), now)
        self._do(do.MakePlan(demand.deployment, deployment.serial, demand, deployment.footprint, inventory))

    def inventory(self, deployment: str) -> tuple[NodeInventory, ...]:
        """Every member as the planner may use it for `deployment`."""
        held = without_this(self.ledger.reserved, deployment)
        own = NodeInventory(
            self.node,
            self.me.name,
            self.me.memory_usable - held,
            cores=self.me.cores,
            cached=announcing.artifacts(self.cached),
        )
        nodes = [own]
        for node, entry in self.roster.entries.items():
            body, excluded = entry.body, ""
            if self.roster.authors[node].role != "member":
                excluded = "client"
            elif entry.left:
                excluded = "draining"
            elif not self.reachable(node) or node in self.roster.conflicts:
                excluded = "unreachable"
            elif body.llama != self.me.llama:
                excluded = "incompatible"
            taken = without_this({held.deployment: held.bytes for held in body.reserved}, deployment)
            usable = max(0, body.memory_usable - taken)
            cached = announcing.artifacts(body.cached)
            nodes.append(NodeInventory(node, body.name, usable, cached=cached, excluded=excluded))
        return tuple(nodes)

    def _announce_soon(self, now: float) -> None:
        self.membership.voice.soon(now)

    def _partners(self) -> frozenset[NodeId]:
        """The nodes of every run that this node takes part in: links to them are kept whatever the mesh's size."""
        if not (self.deployments or self.ledger.held or self._unsent):
            return frozenset()
        runs = [deployment.run.claim for deployment in self.deployments.values() if deployment.run is not None]
        runs += [held.claim for held in self.ledger.held.values()]
        found = {stage.node for claim in runs for stage in claim.stages} | {claim.coordinator for claim in runs}
        return frozenset(found | set(self._unsent))

    def _body(self) -> Body:
        return Body(
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
        )

    def _stop(self, now: float) -> None:
        for key in list(self.deployments):
            self._withdraw(key, "leaving", now)
        while self._local:
            self._received(self.node, self._local.popleft(), now)
        for fence in list(self.ledger.held):
            self._release(fence, now)
        self.stopping = True
        self.membership.speak(self._body(), now)
        self._follow(now)
        for peer in self.links.linked():
            self._do(do.Send(peer, Leave()))

    # --- small -------------------------------------------------------------------------------------------------

    def _do(self, effect: do.Effect) -> None:
        self._effects.append(effect)

    def _send(self, peer: NodeId, message: AnyMessage) -> None:
        if peer == self.node:
            self._local.append(message)
        elif self.links.up(peer) or self.membership.standing.size <= SMALL:
            self._do(do.Send(peer, message))
        else:
            self._unsent.setdefault(peer, deque(maxlen=UNSENT)).append(message)

    def _require_member(self, peer: NodeId) -> None:
        author = self.roster.authors.get(peer)
        if peer != self.node and (author is None or author.role != "member"):
            raise PeerError("only members may claim")

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

    def _trace(self, message: str) -> None:
        self._do(do.Trace(message))
