"""Which models there are and where, for the HTTP surface of this node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Literal

import trio

from meshnode.app.heads import Heads, ServedRun
from meshnode.app.passing import StreamedAnswer, ask
from meshnode.app.shelf import unavailable
from meshnode.core.membership.roster import Entry
from meshnode.core.node.mediator import Mediator
from meshnode.identity.certificates import Role
from meshnode.identity.ids import NodeId
from meshnode.io.http.backend import ModelListing, PassedRequest
from meshnode.io.transport.transport import Transport
from meshnode.wire.preface import StreamClass

State = Literal["loading", "ready", "failed"]

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

    def models(self) -> tuple[ModelListing, ...]:
        """All models of the mesh, each id once; one that is ready hides others of its name."""
        found: dict[str, ModelListing] = {}
        for listing in (*self._opening(), *self._own(), *self._elsewhere()):
            if listing.id not in found or found[listing.id].state != "ready":
                found[listing.id] = listing
        return tuple(found[name] for name in sorted(found))

    def local(self, model_id: str) -> ServedRun | None:
        """The run of that model whose head is here."""
        return next((run for run in self._heads.serving.values() if run.id == model_id), None)

    @asynccontextmanager
    async def pass_on(self, model_id: str, request: PassedRequest) -> AsyncIterator[StreamedAnswer]:
        """Send the request to the node of the model's head. Raises Unavailable or LinkLost."""
        node = self._where(model_id)
        if node is None:
            raise unavailable(model_id)
        async with self._dialing[node]:
            stream = await self._transport.dial(node, self._mediator.addresses_of(node), StreamClass.REQUEST)
        async with ask(stream, request) as answered:
            yield answered

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
            state: State = "ready" if ready else "failed" if deployment.failures else "loading"
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

    def _where(self, model_id: str) -> NodeId | None:
        nodes = (
            node for node, entry in self._linked() if any(served.model == model_id for served in entry.body.served)
        )
        return next(nodes, None)

    def _linked(self) -> Iterator[tuple[NodeId, Entry]]:
        """Who can be asked now: what a mere client says that it serves must not draw others' prompts to it."""
        for node, entry in sorted(self._mediator.roster.entries.items()):
            member = self._mediator.roster.authors[node].role == Role.MEMBER
            if member and not entry.left and self._mediator.reachable(node):
                yield node, entry
