"""Which models there are and where, for the HTTP surface of this node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Literal

import trio

from meshnode.app.heads import Heads, ServedRun
from meshnode.app.passing import StreamedAnswer, ask
from meshnode.app.replicas import Load, Replicas, header_of
from meshnode.app.shelf import unavailable
from meshnode.core.membership.roster import Entry
from meshnode.core.node.mediator import Mediator
from meshnode.errors import LinkLost, MeshError, PeerError
from meshnode.identity.certificates import Role
from meshnode.identity.ids import NodeId
from meshnode.io.http.backend import ModelListing, PassedRequest
from meshnode.io.transport.transport import Transport
from meshnode.wire.preface import StreamClass

State = Literal["loading", "ready", "failed"]

NOT_TAKEN = (429, 503)
"""Statuses of an answer that another replica may give instead: its queue is full, or it drains."""
DIALS = 4
"""Handshakes at once with one node: it takes 8 of one address, and other streams need some. One takes 2 ms."""


class MeshDirectory:
    """io.http.backend.Directory over the mediator and the heads of this node."""

    def __init__(self, mediator: Mediator, heads: Heads, transport: Transport, opening: Mapping[str, int]) -> None:
        """`opening`: models of this node that are still being hashed, with the time they were asked for."""
        self._mediator = mediator
        self._heads = heads
        self._transport = transport
        self._dialing: defaultdict[NodeId, trio.CapacityLimiter] = defaultdict(lambda: trio.CapacityLimiter(DIALS))
        self._being_read = opening
        self._replicas = Replicas(trio.current_time)

    def models(self) -> tuple[ModelListing, ...]:
        """All models of the mesh, each id once; one that is ready hides others of its name."""
        found: dict[str, ModelListing] = {}
        for listing in (*self._opening(), *self._own(), *self._elsewhere()):
            if listing.id not in found or found[listing.id].state != "ready":
                found[listing.id] = listing
        return tuple(found[name] for name in sorted(found))

    def local(self, model_id: str, *, passed: bool) -> ServedRun | None:
        """The run of that model whose head is here, where a request would wait longer elsewhere, or may not go on."""
        runs = [run for run in self._heads.serving.values() if run.id == model_id]
        best = self._best(runs)
        if best is None or passed:
            return best
        first = self._replicas.ranked(self._where(model_id), model_id, self._load(best))[0]
        return best if first is None else None

    def here(self) -> tuple[ServedRun, ...]:
        """Every head that takes requests."""
        return tuple(self._heads.serving.values())

    @asynccontextmanager
    async def pass_on(self, model_id: str, request: PassedRequest) -> AsyncIterator[StreamedAnswer]:
        """Send the request to the head that answers soonest, and to the next where it was not taken.

        Raises Unavailable or LinkLost.
        """
        problem: MeshError = unavailable(model_id)
        nodes = self._replicas.ranked(self._where(model_id), model_id)
        for node in nodes:
            assert node is not None, "only others were ranked"
            async with AsyncExitStack() as stack:
                stack.enter_context(self._replicas.asking(node, model_id))
                try:
                    answered = await stack.enter_async_context(self._ask(node, request))
                except (LinkLost, PeerError) as error:
                    problem = error  # nothing was answered, so another may be asked
                    continue
                self._replicas.hear(node, model_id, answered.headers)
                if answered.status in NOT_TAKEN and node != nodes[-1]:
                    continue
                yield answered
                return
        raise problem

    @asynccontextmanager
    async def _ask(self, node: NodeId, request: PassedRequest) -> AsyncIterator[StreamedAnswer]:
        async with self._dialing[node]:
            stream = await self._transport.dial(node, self._mediator.addresses_of(node), StreamClass.REQUEST)
        async with ask(stream, request) as answered:
            yield answered

    def loads(self) -> tuple[tuple[str, str], ...]:
        """The header that tells other nodes how busy the heads here are."""
        runs: defaultdict[str, list[ServedRun]] = defaultdict(list)
        for run in self._heads.serving.values():
            runs[run.id].append(run)
        best = {model: self._best(those) for model, those in runs.items()}
        return (header_of({model: self._load(run) for model, run in best.items() if run is not None}),)

    def _best(self, runs: list[ServedRun]) -> ServedRun | None:
        """Of several heads here of one model."""
        loads = [self._load(run) for run in runs]
        usual = min((load.token_us for load in loads if load.token_us), default=1)
        ranked = sorted(range(len(runs)), key=lambda number: loads[number].wait_us(usual))
        return runs[ranked[0]] if runs else None

    def _load(self, run: ServedRun) -> Load:
        now = run.pipeline.statistics()
        deployment = self._mediator.deployments.get(run.claim.deployment)
        plan = None if deployment is None else deployment.plan
        token_us = 0 if plan is None or plan.prediction is None else plan.prediction.token_us
        return Load(len(run.claim.stages), now.lanes_busy + now.queued, token_us)

    def counters(self) -> Mapping[str, int]:
        """Lanes, queue and rejections of every head here, summed."""
        sums: dict[str, int] = {}
        for run in self._heads.serving.values():
            for name, value in run.counters().items():
                sums[name] = sums.get(name, 0) + value
        return sums

    def _opening(self) -> list[ModelListing]:
        name = self._mediator.me.name
        return [ModelListing(model, created, 0, "loading", name) for model, created in self._being_read.items()]

    def _own(self) -> list[ModelListing]:
        listings = []
        for deployment in self._mediator.deployments.values():
            run = deployment.run
            ready = run is not None and run.fence in self._heads.serving
            state: State = "ready" if ready else "failed" if deployment.failed else "loading"
            context = run.claim.options.context if run is not None else 0
            name = self._mediator.me.name
            listings.append(ModelListing(deployment.demand.model, deployment.created, context, state, name))
        return listings

    def _elsewhere(self) -> list[ModelListing]:
        return [
            ModelListing(served.model, served.created, served.context, "ready", entry.body.name)
            for node, entry in self._linked()
            for served in entry.body.served
        ]

    def _where(self, model_id: str) -> Iterator[NodeId]:
        for node, entry in self._linked():
            if any(served.model == model_id for served in entry.body.served):
                yield node

    def _linked(self) -> Iterator[tuple[NodeId, Entry]]:
        """Who can be asked now: what a mere client says that it serves must not draw others' prompts to it."""
        for node, entry in sorted(self._mediator.roster.entries.items()):
            member = self._mediator.roster.authors[node].role == Role.MEMBER
            if member and not entry.left and self._mediator.reachable(node):
                yield node, entry
