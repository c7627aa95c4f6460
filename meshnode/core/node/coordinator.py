"""A coordinator's part of the mediator: the deployments of this node and their runs, from plan to fence.

Invariant: every order of a run is carried out in the order in which the run gave it, and a run that is no longer in its
deployment orders nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import assert_never

import msgspec

from meshnode.core.coordination import orders as order_of
from meshnode.core.coordination.ledger import TERM_JUMP, Ledger, Report
from meshnode.core.coordination.orders import RunOrder
from meshnode.core.coordination.run import Run, State
from meshnode.core.membership.membership import Membership
from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.core.node.claims import Draw
from meshnode.core.node.deployments import DRAIN_S, MAKE_ROOM_S, Deployment, Place
from meshnode.core.node.outbox import Outbox
from meshnode.core.node.participant import is_silent
from meshnode.core.node.register import Register
from meshnode.core.planning.footprint import ModelFootprint
from meshnode.core.planning.inventory import Inventory
from meshnode.errors import PeerError
from meshnode.identity.ids import NodeId
from meshnode.wire.demand import Demand
from meshnode.wire.fence import Fence, is_fence
from meshnode.wire.limits import SOURCES
from meshnode.wire.messages import Abort, Committed, Grant, Progress, Refuse, Renewed

GIVEN_UP = ("given_up", "another node coordinates it")
"""Why a run ends, for machines and for people."""

Answer = Grant | Refuse | Committed | Renewed | Report


@dataclass(frozen=True)
class Offers:
    """What members offer, as the mediator sees it."""

    inventory: Callable[[str, str], Inventory]
    """By the deployment whose memory counts as free (none: an empty name), and the kind of its weights."""
    sources: Callable[[str], tuple[NodeId, ...]]
    """Nodes that have bytes of the model with this manifest, who has most first."""


@dataclass(frozen=True)
class Books:
    """What this node has to know again after a restart."""

    ledger: Ledger
    register: Register


class Coordinator:
    """All deployments that this node coordinates."""

    def __init__(
        self,
        startup_timeout_s: float,
        membership: Membership,
        books: Books,
        out: Outbox,
        offers: Offers,
        draw: Draw,
    ) -> None:
        self._startup_timeout_s = startup_timeout_s
        self._membership = membership
        self._ledger = books.ledger
        self._register = books.register
        self._out = out
        self._offers = offers
        self._draw = draw
        self.deployments: dict[str, Deployment] = {}

    def of(self, fence: Fence) -> tuple[Deployment, Run] | None:
        """The deployment and the run of `fence`, whatever state it is in."""
        for deployment in self.deployments.values():
            run = deployment.find(fence)
            if run is not None:
                return deployment, run
        return None

    def cared_for(self) -> list[str]:
        """The deployments that are not about to be given up."""
        return [key for key, deployment in self.deployments.items() if not deployment.leaving]

    def deadline(self) -> float | None:
        """When `settle` has something to do."""
        times: list[float | None] = []
        for deployment in self.deployments.values():
            times += [deployment.wake_at(), *(run.due_at() for run in deployment.runs())]
        return min((at for at in times if at is not None), default=None)

    def partners(self) -> set[NodeId]:
        """The participants of every run."""
        found = (run for deployment in self.deployments.values() for run in deployment.runs())
        return {node for run in found for node in run.participants}

    # --- what happens ---------------------------------------------------------------------------------------------

    def demanded(self, event: on.Demanded, now: float) -> None:
        """Somebody at this node wants a model."""
        self._begin(event.demand, event.footprint, event.created, now)

    def _begin(self, demand: Demand, footprint: ModelFootprint, created: int, now: float) -> Deployment:
        key = demand.deployment
        deployment = self.deployments[key] = Deployment(
            demand,
            footprint,
            created,
            self._membership.node,
            self._startup_timeout_s,
            now,
            rules=self._ledger.rules,
            term=self._ledger.promised.get(key, 0),
        )
        own = self._membership.node
        held = [run for run in self._ledger.held.values() if run.claim.deployment == key]
        others = [run for run in held if run.claim.coordinator != own]
        if others:
            last = max(others, key=lambda run: (run.committed, run.claim.fence))
            deployment.inherits = last.claim.fence
            deployment.predecessors = frozenset(run.claim.coordinator for run in others)
            deployment.inherited = last.claim if last.committed else None
            deployment.term = max(deployment.term, *(run.claim.fence.term for run in others))
        self._membership.voice.soon(now)
        return deployment

    def succeed(self, demand: Demand, footprint: ModelFootprint, before: set[NodeId], now: float) -> None:
        """Care for a demand that nobody cares for any more, `before` did: go on with what is loaded here, if it is."""
        deployment = self._begin(demand, footprint, demand.created, now)
        deployment.has_file = False
        deployment.predecessors |= before

    def revised(self, demand: Demand, now: float) -> None:
        """A later version of a demand that this node cares for."""
        deployment = self.deployments[demand.deployment]
        if _asks(deployment.demand) == _asks(demand):
            deployment.demand = demand
            return
        self.withdraw(demand.deployment, "withdrawn", now)
        has_file = deployment.has_file
        self._begin(demand, deployment.footprint, deployment.created, now).has_file = has_file

    def give_up(self, key: str, now: float) -> None:
        """Another coordinator cares for it: what streams here may end."""
        deployment = self.deployments[key]
        current = deployment.current
        if current is None or current.state is not State.SERVING:
            self._end(key, GIVEN_UP, now)
            return
        deployment.leaving = True
        for run in deployment.runs():
            if run is not current:
                self._obey(deployment, run, run.end(*GIVEN_UP), now)
        self._obey(deployment, current, current.drain(now, MAKE_ROOM_S), now)
        self._membership.voice.soon(now, settle=0.0)

    def leave(self, now: float) -> None:
        """This node goes away: what is loaded for it elsewhere waits for a successor as long as its lease lasts."""
        for key in list(self.deployments):
            deployment = self.deployments.pop(key)
            for run in deployment.runs():
                ends = run.end("leaving", "its coordinator leaves")
                if run is deployment.current:
                    ends = [each for each in ends if not isinstance(each, order_of.Order)]
                self._obey(deployment, run, ends, now)

    def withdraw(self, key: str, reason: str, now: float) -> None:
        """It is no longer wanted."""
        self._end(key, (reason, "the model is no longer wanted"), now)

    def _end(self, key: str, why: tuple[str, str], now: float) -> None:
        deployment = self.deployments.pop(key, None)
        if deployment is not None:
            for run in deployment.runs():
                self._obey(deployment, run, run.end(*why), now)
            self.changed(now)  # others may wait for the memory
            self._membership.voice.soon(now)  # or for somebody who cares for it

    def changed(self, now: float, spared: Collection[NodeId] = ()) -> None:
        """The members, or what one of them offers, are others than before. `spared`: this node, where it is drained."""
        if not self.deployments:
            return
        spared = {node for node, entry in self._membership.roster.entries.items() if entry.body.draining}.union(spared)
        for deployment in self.deployments.values():
            deployment.changed(now, spared)

    def answered(self, peer: NodeId, message: Answer, now: float) -> None:
        """A participant's answer or report. Raises PeerError for impossible figures."""
        _check_figures(message)
        found = self.of(message.fence)
        if found is not None:
            deployment, run = found
            if isinstance(message, Refuse) and peer in run.participants:
                self._learn(deployment, message, now)
            self._obey(deployment, run, run.received(peer, message, now), now)
        elif isinstance(message, Refuse):
            # A run ends with its first refusal; the others still say from which term on a claim is heard.
            known = self.deployments.get(message.deployment)
            if known is not None:
                known.term = max(known.term, min(message.promised, known.term + TERM_JUMP - 1))
        elif not isinstance(message, Renewed):
            self._out.send(peer, Abort(message.fence, "unknown"))

    def _learn(self, deployment: Deployment, refused: Refuse, now: float) -> None:
        """Of a coordinator that is gone a participant has a run loaded, which this node knew nothing of: the next claim
        takes its place."""
        fence, holder = refused.holder_fence, refused.holder
        if fence is None or deployment.current is not None or fence.term > deployment.term:
            return
        if is_silent(self._membership, holder, now) and (deployment.inherits is None or deployment.inherits < fence):
            deployment.inherits, deployment.predecessors = fence, deployment.predecessors | {holder}

    def head_reported(self, event: on.HeadOpened | on.HeadFailed | on.HeadDrained, now: float) -> None:
        """The head of a run came through, is empty, or is lost."""
        found = self.of(event.fence)
        if found is None:
            return
        deployment, run = found
        match event:
            case on.HeadOpened():
                self._obey(deployment, run, run.head_opened(now), now)
            case on.HeadFailed():
                self._obey(deployment, run, run.head_failed(event.message, event.reason), now)
            case on.HeadDrained():
                self._drained(deployment, run, now)
            case _:
                assert_never(event)

    def planned(self, event: on.Planned | on.PlanFailed, now: float) -> None:
        """A plan, a shortfall, or neither."""
        deployment = self.deployments.get(event.deployment)
        if deployment is None:
            return
        if isinstance(event, on.PlanFailed):
            deployment.plan_failed(event.serial, event.message, now)
            return
        run = deployment.planned(event.serial, event.outcome, self._draw, now)
        if run is not None:
            self._claim(deployment, run, now)
        elif deployment.current is None:
            self._out.trace(f"no plan for {deployment.demand.model} yet")

    def _claim(self, deployment: Deployment, run: Run, now: float) -> None:
        key = deployment.demand.deployment
        run.claim = msgspec.structs.replace(run.claim, demand=self._register.provable(key, now))
        own = self._membership.node
        run.source, *others = (
            (own,) if deployment.has_file else self._offers.sources(run.claim.manifest_digest) or (own,)
        )
        run.sources = tuple(others[:SOURCES])
        self._out.trace(f"{run.fence}: claiming {len(run.claim.stages)} stages for {run.claim.model}")
        self._obey(deployment, run, run.start(now), now)

    def lost(self, peer: NodeId, message: str, now: float) -> None:
        """A member is gone."""
        for deployment in list(self.deployments.values()):
            for run in deployment.runs():
                self._obey(deployment, run, run.lost(peer, message), now)
            deployment.changed(now)

    def unlinked(self, peer: NodeId, message: str, now: float) -> None:
        """Orders and reports may have been lost with the link: a run that does not serve yet starts over."""
        for deployment in self.deployments.values():
            run = deployment.attempt
            if run is not None:
                self._obey(deployment, run, run.lost(peer, message), now)

    # --- every time -----------------------------------------------------------------------------------------------

    def expire(self, now: float) -> None:
        """Judge leases and deadlines; before anything else that happens at `now`."""
        for deployment in list(self.deployments.values()):
            for run in deployment.runs():
                self._obey(deployment, run, run.expire(now), now)

    def settle(self, now: float) -> None:
        """Renewals and plans that are due."""
        for deployment in list(self.deployments.values()):
            for run in deployment.runs():
                self._obey(deployment, run, run.renewals(now), now)
            if deployment.leaving and deployment.current is None:
                self._end(deployment.demand.deployment, GIVEN_UP, now)
            elif deployment.due(now):
                self._make_plan(deployment, now)

    def _make_plan(self, deployment: Deployment, now: float) -> None:
        demand = deployment.demand
        freed = demand.deployment if deployment.place is Place.INSTEAD else ""
        offered = self._offers.inventory(freed, deployment.footprint.weight_kind)
        if not deployment.has_file:
            offered = msgspec.structs.replace(offered, head=self._membership.node)
        deployment.silent = {
            node for node in deployment.missed() if is_silent(self._membership, node, now) and self._pings(node)
        }
        inventory = deployment.view(offered, now)
        inherited = deployment.inherit(inventory, self._draw)
        if inherited is not None:
            self._claim(deployment, inherited, now)
        elif not deployment.knows(inventory, now):
            self._out.do(do.MakePlan(demand.deployment, deployment.serial, demand, deployment.footprint, inventory))

    def _pings(self, node: NodeId) -> bool:
        """Whether silence of it means anything: it is asked every second."""
        link = self._membership.links.links.get(node)
        return link is not None and link.watched

    # --- what runs order ------------------------------------------------------------------------------------------

    def _obey(self, deployment: Deployment, run: Run, orders: list[RunOrder], now: float) -> None:
        for order in orders:
            match order:
                case order_of.Order():
                    self._out.send(order.node, order.message)
                case order_of.OpenHead():
                    self._out.do(do.OpenHead(run.claim, run.hops, deployment.created))
                case order_of.ServeHead():
                    self._out.do(do.ServeHead(order.fence))
                case order_of.DrainHead():
                    self._out.do(do.DrainHead(order.fence))
                case order_of.CloseHead():
                    self._out.do(do.CloseHead(order.fence))
                case order_of.Decide():
                    self._ledger.decide(run.claim.deployment, order.fence)
                    self._out.do(do.Persist(self._ledger.encode()))
                case order_of.FetchedAll():
                    self._make_room(deployment, run, now)
                case order_of.Drained():
                    self._drained(deployment, run, now)
                case order_of.Served():
                    self._served(deployment, run, now)
                case order_of.Ended():
                    self._ended(deployment, run, order, now)
                case _:
                    assert_never(order)

    def _served(self, deployment: Deployment, run: Run, now: float) -> None:
        """The new run serves: those before it finish what streams, or end if they are broken."""
        self._out.trace(f"{run.fence}: serves {run.claim.model}")
        for former in deployment.served(now):
            if former.state is State.BROKEN:
                self._obey(deployment, former, former.fence_off(run.claim), now)
            else:
                self._obey(deployment, former, former.drain(now, DRAIN_S), now)
        self._membership.voice.soon(now, settle=0.0)  # clients of every node wait for this one

    def _make_room(self, deployment: Deployment, attempt: Run, now: float) -> None:
        """All that the attempt needs is on disk: the run in whose place it comes finishes what streams."""
        yielding = deployment.yields_to(attempt)
        if yielding is None:
            self._obey(deployment, attempt, attempt.room_made(now), now)
        else:
            self._obey(deployment, yielding, yielding.drain(now, MAKE_ROOM_S), now)
            self._membership.voice.soon(now, settle=0.0)

    def _drained(self, deployment: Deployment, run: Run, now: float) -> None:
        """Nothing streams through a run that is to go."""
        if run.state is not State.DRAINING:
            return
        if deployment.leaving:
            self._end(deployment.demand.deployment, GIVEN_UP, now)
        elif deployment.current is not None:
            self._obey(deployment, run, run.fence_off(deployment.current.claim), now)
        elif deployment.attempt is not None:
            self._obey(deployment, run, run.give_way(deployment.attempt.claim), now)

    def _ended(self, deployment: Deployment, run: Run, end: order_of.Ended, now: float) -> None:
        self._out.trace(f"{end.fence} ended: {end.reason}: {end.message}")
        deployment.ended(run, end, self._draw, now)
        self._membership.voice.soon(now)
        if run.claim.deployment not in self.deployments:
            return  # withdrawn: nothing comes back
        resumed, waiting = deployment.resumed(), deployment.waiting()
        if resumed is not None:
            self._obey(deployment, resumed, resumed.resume(), now)
        elif waiting is not None:
            self._obey(deployment, waiting, waiting.room_made(now), now)


def _check_figures(message: Answer) -> None:
    match message:
        case Refuse():
            wrong = message.free_bytes < 0 or not (message.holder_fence is None or is_fence(message.holder_fence))
        case Progress():
            wrong = min(message.done, message.total) < 0
        case _:
            wrong = False
    if wrong:
        raise PeerError("an answer with impossible figures")


def _asks(demand: Demand) -> Demand:
    """What of a demand decides how it is served."""
    return msgspec.structs.replace(demand, version=0, author=NodeId(""), created=0)
