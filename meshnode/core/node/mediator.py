"""The mediator of one node: every event goes in here, every decision comes out as an effect.

Invariant: the same events at the same times give the same effects; nothing here reads a clock, draws a random number
of its own, or touches anything outside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from meshnode.core.coordination.ledger import Ledger
from meshnode.core.coordination.run import CloseHead as HeadEnds
from meshnode.core.coordination.run import Ended, Order, RunOrder, State
from meshnode.core.coordination.run import OpenHead as HeadBegins
from meshnode.core.membership.announcement import Authority, Body, announce
from meshnode.core.membership.links import Links
from meshnode.core.membership.roster import Roster
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
    Announce,
    AnyMessage,
    Claim,
    Commit,
    Connect,
    Connected,
    Failed,
    Grant,
    Introduce,
    Leave,
    Ping,
    Pong,
    Prepare,
    Progress,
    Ready,
    Refuse,
    Unknown,
)

REFRESH_S = 60.0
"""An announcement is repeated so often, and lives three times as long."""
FORGET_S = 24 * 3600.0
"""A lost peer stays listed (and dialed) for a day, and its numbers are remembered as long."""
ANNOUNCE_MIN_S = 0.2
"""Changes within this time travel together."""


@dataclass(frozen=True)
class Self:
    """What this node says of itself and does not change while it runs."""

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

    def __init__(self, me: Self, authority: Authority, draw: Callable[[int], bytes], now: float) -> None:
        self.me = me
        self.authority = authority
        self.node = authority.node
        self.draw = draw
        self.started_at = now
        self.roster = Roster(authority)
        self.links = Links()
        self.hints: dict[NodeId, tuple[str, ...]] = {}
        self.ledger = Ledger(self.node, me.memory_usable)
        self.deployments: dict[str, Deployment] = {}
        self.cached: dict[str, tuple[tuple[int, int], ...]] = {}
        self.counters = {"refused_messages": 0, "stale_orders": 0}
        self.stopping = False
        self._sequence = 0
        self._own: Announce | None = None
        self._announce_at: float | None = now
        self._introduced: dict[NodeId, set[NodeId]] = {}
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
        times = [self.links.deadline(), self._announce_at]
        for deployment in self.deployments.values():
            times += [deployment.plan_at, deployment.run.deadline if deployment.run else None]
        return min((at for at in times if at is not None), default=None)

    def run_of(self, fence: Fence) -> Deployment | None:
        """The deployment of this coordinator whose present run has `fence`."""
        return next((d for d in self.deployments.values() if d.run is not None and d.run.fence == fence), None)

    # --- events ---------------------------------------------------------------------------------------------

    def _dispatch(self, event: on.Event, now: float) -> None:
        match event:
            case on.PeerFound():
                if event.node != self.node and event.node not in self.roster.entries:
                    self.hints[event.node] = event.addresses
                    self.links.know(event.node, now)
            case on.LinkOpened():
                self._link_opened(event.peer, now)
            case on.LinkClosed():
                self._link_closed(event.peer, event.reason, now)
            case on.Received():
                self._received(event.peer, event.message, now)
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
            case on.CacheChanged():
                self.cached = event.cached
                self._announce_soon(now)
            case on.Stopping():
                self._stop(now)
            case on.TimePassed():
                pass

    def _link_opened(self, peer: NodeId, now: float) -> None:
        self.links.opened(peer, now)
        self._introduced[peer] = set()
        if self._own is not None:
            self._pass_on(peer, self._own, self.authority.chain)
        for node, entry in self.roster.entries.items():
            if node != peer and not entry.left:
                self._pass_on(peer, entry.record, self.roster.chains[node])
        for deployment in self.deployments.values():
            deployment.changed(now)
        # An Abort may have been lost with the old link: a coordinator that no longer knows the run says it again.
        for fence in self.ledger.of_coordinator(peer):
            self._send(peer, Grant(fence, self.ledger.held[fence].claim.deployment))

    def _link_closed(self, peer: NodeId, reason: str, now: float) -> None:
        """Orders and reports may have been lost with the link: a run that does not serve yet starts over."""
        self._introduced.pop(peer, None)
        if peer not in self.links.links:
            return  # it left: nobody dials it until it is heard of again
        self.links.closed(peer, reason, now)
        for deployment in self.deployments.values():
            if deployment.run is not None and deployment.run.state is not State.SERVING:
                self._obey(deployment, deployment.run.lost(peer, f"the link to {self.name_of(peer)} was lost"), now)

    def _received(self, peer: NodeId, message: AnyMessage, now: float) -> None:
        self.links.heard(peer, now)
        try:
            self._message(peer, message, now)
        except StaleFence:
            self.counters["stale_orders"] += 1
        except PeerError as error:
            self.counters["refused_messages"] += 1
            self._do(do.CloseLink(peer, str(error)))

    def _message(self, peer: NodeId, message: AnyMessage, now: float) -> None:
        match message:
            case Introduce():
                self.roster.introduce(message.chain)
            case Announce():
                self._announced(peer, message, now)
            case Leave():
                self.roster.leave(peer)
                self.links.forget(peer)
                self._lost(peer, "the node left", now)
            case Ping():
                self._do(do.Send(peer, Pong(message.nonce)))
            case Pong():
                self.links.pong(peer, message.nonce, now)
            case Claim() | Prepare() | Connect() | Commit() | Abort():
                self._ordered(peer, message, now)
            case Grant() | Refuse() | Progress() | Ready() | Connected() | Failed():
                self._answered(peer, message, now)
            case Unknown():
                pass
            case _:
                assert_never(message)

    def _announced(self, peer: NodeId, record: Announce, now: float) -> None:
        author = record.author
        before = self.roster.entries.get(author)
        if not self.roster.offer(record, now):
            return
        if before is not None and before.body.incarnation < self.roster.entries[author].body.incarnation:
            self._lost(author, f"{before.body.name} was restarted", now)
        self.hints.pop(author, None)
        self.links.know(author, now)
        for other in self.links.links.values():
            if other.up and other.node not in (peer, author):
                self._pass_on(other.node, record, self.roster.chains[author])
        for deployment in self.deployments.values():
            deployment.changed(now)

    # --- a participant's part ---------------------------------------------------------------------------------

    def _ordered(self, peer: NodeId, message: Claim | Prepare | Connect | Commit | Abort, now: float) -> None:
        match message:
            case Claim():
                self._require_member(peer)
                answer = self.ledger.claim(peer, message)
                if isinstance(answer, Grant):
                    self._do(do.Persist(self.ledger.encode()))
                self._trace(f"claim of {message.fence} for {message.model}: {type(answer).__name__.lower()}")
                self._send(peer, answer)
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
            self._announce_at = now  # clients of every node wait for this one
        else:
            self._obey(deployment, deployment.run.end("stage_lost", event.message), now)

    def _planned(self, event: on.Planned | on.PlanFailed, now: float) -> None:
        deployment = self.deployments.get(event.deployment)
        if deployment is None:
            return
        if isinstance(event, on.PlanFailed):
            deployment.plan_failed(event.serial, event.message, now)
            return
        run = deployment.planned(event.serial, event.outcome, self.draw)
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
        for peer in self.links.silent(now):
            self._do(do.CloseLink(peer, "no word for too long"))
        for peer in self.links.given_up(now):
            self._lost(peer, f"the link to {self.name_of(peer)} was lost", now)
        if self.stopping:
            return
        for link in list(self.links.dials(now)):
            self._do(do.Dial(link.node, self.addresses_of(link.node)))
        for link in self.links.pings(now):
            self._do(do.Send(link.node, Ping(link.ping_nonce)))
        for deployment in list(self.deployments.values()):
            if deployment.run is not None:
                self._obey(deployment, deployment.run.expire(now), now)
            if deployment.due(now):
                self._make_plan(deployment, now)
        if self._announce_at is not None and self._announce_at <= now:
            self._announce(now)
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
            elif entry.left or not self.links.up(node):
                excluded = "draining" if entry.left else "unreachable"
            elif body.llama != self.me.llama:
                excluded = "incompatible"
            taken = without_this({held.deployment: held.bytes for held in body.reserved}, deployment)
            usable = max(0, body.memory_usable - taken)
            cached = announcing.artifacts(body.cached)
            nodes.append(NodeInventory(node, body.name, usable, cached=cached, excluded=excluded))
        return tuple(nodes)

    def _announce_soon(self, now: float) -> None:
        if self._announce_at is None or self._announce_at > now + ANNOUNCE_MIN_S:
            self._announce_at = now + ANNOUNCE_MIN_S

    def _announce(self, now: float) -> None:
        for gone in self.roster.forget(now - FORGET_S):
            self.links.forget(gone)
        self._sequence += 1
        body = Body(
            mesh=self.authority.mesh,
            node=self.node,
            incarnation=self.me.incarnation,
            sequence=self._sequence,
            name=self.me.name,
            addresses=self.me.addresses,
            memory_usable=self.me.memory_usable,
            software=self.me.software,
            llama=self.me.llama,
            reserved=announcing.reserved(self.ledger.reserved),
            served=announcing.served(self.deployments.values()),
            cached=announcing.cached(self.cached),
        )
        self._own = announce(body, self.authority)
        self._announce_at = now + REFRESH_S
        for link in self.links.links.values():
            if link.up:
                self._pass_on(link.node, self._own, self.authority.chain)

    def _stop(self, now: float) -> None:
        for key in list(self.deployments):
            self._withdraw(key, "leaving", now)
        while self._local:
            self._received(self.node, self._local.popleft(), now)
        for fence in list(self.ledger.held):
            self._release(fence, now)
        for link in self.links.links.values():
            if link.up:
                self._do(do.Send(link.node, Leave()))
        self.stopping = True

    # --- small -------------------------------------------------------------------------------------------------

    def _do(self, effect: do.Effect) -> None:
        self._effects.append(effect)

    def _send(self, peer: NodeId, message: AnyMessage) -> None:
        if peer == self.node:
            self._local.append(message)
        else:
            self._do(do.Send(peer, message))

    def _pass_on(self, peer: NodeId, record: Announce, chain: tuple[bytes, ...]) -> None:
        introduced = self._introduced.setdefault(peer, set())
        if record.author not in introduced:
            introduced.add(record.author)
            self._do(do.Send(peer, Introduce(chain)))
        self._do(do.Send(peer, record))

    def _require_member(self, peer: NodeId) -> None:
        author = self.roster.authors.get(peer)
        if peer != self.node and (author is None or author.role != "member"):
            raise PeerError("only members may claim")

    def addresses_of(self, node: NodeId) -> tuple[str, ...]:
        """Where `node` can be dialed; this node too, by its own stages and heads."""
        if node == self.node:
            return self.me.addresses
        body: Body | None = self.roster.body(node)
        return body.addresses if body is not None else self.hints.get(node, ())

    def name_of(self, node: NodeId) -> str:
        """What a person called this node."""
        if node == self.node:
            return self.me.name
        body = self.roster.body(node)
        return body.name if body is not None else short(node)

    def _trace(self, message: str) -> None:
        self._do(do.Trace(message))
