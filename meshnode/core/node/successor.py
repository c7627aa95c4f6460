"""Who cares for a demand when nobody does: one of the nodes that have what a head needs, in an order all can work out.

    no word of its coordinator for 2 s + rank x 300 ms + jitter -> its model is opened here -> claimed

Invariants: a node claims what another coordinated only on its own evidence that that one is gone; of several that care
for one demand all but one give it up; a demand that is wanted is tried again until somebody cares for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from meshnode.core.coordination.ledger import Ledger
from meshnode.core.membership.announcement import COORDINATED, Body
from meshnode.core.membership.gossip import Draw
from meshnode.core.membership.membership import Membership
from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.core.node.coordinator import Books, Coordinator
from meshnode.core.node.outbox import Outbox
from meshnode.core.node.participant import SILENT_S
from meshnode.identity.ids import NodeId
from meshnode.wire.demand import Demand

RANK_S = 0.3
"""Between two candidates: a claim of the first has arrived by then, and its announcement mostly."""
JITTER_S = 0.1
WAKE_S = 3.0
"""After a start: until it is linked to whoever cares for a demand, and has heard so."""
OPEN_AGAIN_S = 30.0
"""After a model could not be opened here."""

Ranges = tuple[tuple[int, int], ...]


@dataclass
class Wait:
    """A demand that this node does not care for itself."""

    heard_at: float
    """The last word of somebody who cares for it; else when this node began to wait."""
    jitter_s: float
    since: dict[NodeId, float] = field(default_factory=dict)
    """From when on each of those who care for it was listened to."""
    left: bool = False
    """Who cared for it last said goodbye."""
    opening: bool = False
    began_at: float = 0.0
    """When this node began to open it."""


class Successor:
    """This node as one that may go on where another stopped."""

    def __init__(
        self,
        membership: Membership,
        books: Books,
        coordinator: Coordinator,
        out: Outbox,
        cached: Callable[[], dict[str, Ranges]],
        draw: Draw,
    ) -> None:
        self._membership = membership
        self._ledger: Ledger = books.ledger
        self._demands = books.register.demands
        self._coordinator = coordinator
        self._out = out
        self._cached = cached
        self._draw = draw
        self._began_at: float | None = None
        self._due: float | None = None
        self._news = True
        self._seen: object = None
        self.partners: frozenset[NodeId] = frozenset()
        """Who cares for what this node could go on with: they are listened to closely."""
        self.waits: dict[str, Wait] = {}

    def deadline(self) -> float | None:
        """When `settle` has something to do."""
        return self._due

    def changed(self) -> None:
        """Who is there, or what one of them says, is other than before."""
        self._news = True

    def opening(self) -> list[str]:
        """What this node is about to care for."""
        return [key for key, wait in self.waits.items() if wait.opening]

    # --- events -------------------------------------------------------------------------------------------------

    def opened(self, event: on.ModelOpened, now: float) -> None:
        """The model is here: claim what nobody cares for still."""
        demand = self._demands.find(event.deployment)
        wait = self.waits.get(event.deployment)
        if demand is None or demand.removed or wait is None:
            return
        self._listen(event.deployment, wait, now)
        wait.opening, self._news = False, True
        self._membership.voice.soon(now, settle=0.0)
        if now >= self._due_at(demand, wait, now):
            del self.waits[event.deployment]
            self._out.trace(f"{demand.model}: nobody coordinates it any more, this node does from now on")
            self._coordinator.succeed(demand, event.footprint, set(wait.since), now)

    def not_opened(self, event: on.ModelNotOpened, now: float) -> None:
        """Another may; this node tries again later."""
        wait = self.waits.get(event.deployment)
        if wait is not None:
            wait.opening, wait.heard_at, self._news = False, now + OPEN_AGAIN_S, True
            self._membership.voice.soon(now, settle=0.0)
            self._out.trace(f"{event.deployment} cannot be coordinated here: {event.message}")

    def cared_for(self, key: str, now: float) -> bool:
        """Whether somebody else is heard who cares for it."""
        links = self._membership.links.links
        found = [links.get(node) for node, body in self._holders(key) if body is not None and key in body.coordinates]
        return any(link is not None and link.up and now - link.heard_at <= SILENT_S for link in found)

    # --- every time ---------------------------------------------------------------------------------------------

    def settle(self, now: float) -> None:
        """Open what is to be gone on with, and give up what another cares for."""
        if self._began_at is None:
            self._began_at = now
        # What is heard meanwhile only puts off what is due: in between there is nothing to look at.
        seen = (tuple(self._coordinator.deployments), len(self._ledger.held), self._demands.changes, self._cached())
        if not self._news and seen == self._seen and (self._due is None or now < self._due):
            return
        self._news, self._seen = False, seen
        for key in list(self._coordinator.deployments):
            self._yield(key, now)
        self._due = None
        waiting = self._waiting()
        mine = [demand.deployment for demand in waiting if self._can(demand)]
        self.partners = frozenset(node for key in mine for node, _ in self._holders(key))
        for key in self.waits.keys() - {demand.deployment for demand in waiting}:
            del self.waits[key]
        for demand in waiting:
            wait = self.waits.get(demand.deployment)
            if wait is None:
                wait = self.waits[demand.deployment] = Wait(max(now, self._began_at + WAKE_S), self._share() * JITTER_S)
            self._listen(demand.deployment, wait, now)
            if wait.opening or not self._can(demand):
                continue
            due = self._due_at(demand, wait, now)
            if due <= now:
                wait.opening, wait.began_at = True, now
                self._out.do(do.OpenModel(demand))
                self._membership.voice.soon(now, settle=0.0)  # the next in line waits
            elif self._due is None or due < self._due:
                self._due = due

    def _waiting(self) -> list[Demand]:
        return [each for each in self._demands.wanted() if each.deployment not in self._coordinator.deployments]

    def _share(self) -> float:
        return int.from_bytes(self._draw(2), "big") / 65536

    def _listen(self, key: str, wait: Wait, now: float) -> None:
        """Note when somebody who cares for it was heard last."""
        holders, own = [node for node, _ in self._holders(key)], self._membership.node
        wait.since = {node: wait.since.get(node, now) for node in holders}
        for node in holders:
            link, entry = self._membership.links.links.get(node), self._membership.roster.entries.get(node)
            if entry is not None and entry.left:
                wait.left = True
            elif wait.opening and wait.since[node] >= wait.began_at and self._place(key, node) > self._place(key, own):
                continue  # it began at the same time, and will hear that this node comes first
            elif link is not None and link.up:
                wait.left = False
                wait.heard_at = max(wait.heard_at, link.heard_at, wait.since[node])

    def _due_at(self, demand: Demand, wait: Wait, now: float) -> float:
        silence = 0.0 if wait.left else SILENT_S
        return wait.heard_at + silence + self._rank(demand, self._membership.node) * RANK_S + wait.jitter_s

    def _holders(self, key: str) -> Iterator[tuple[NodeId, Body | None]]:
        """Others who care for it: by the runs that are loaded here for them, or by their word."""
        entries, own = self._membership.roster.entries, self._membership.node
        for run in self._ledger.held.values():
            coordinator = run.claim.coordinator
            if run.claim.deployment == key and coordinator != own:
                entry = entries.get(coordinator)
                yield coordinator, None if entry is None else entry.body
        for node, entry in entries.items():
            if key in entry.body.coordinates and not entry.dead and not entry.expired and self._is_member(node):
                yield node, entry.body

    def _is_member(self, node: NodeId) -> bool:
        author = self._membership.roster.authors.get(node)
        return author is not None and author.role == "member"

    # --- who may ------------------------------------------------------------------------------------------------

    def _can(self, demand: Demand) -> bool:
        """Whether this node has what a head needs, and nothing speaks against it."""
        alone = self._membership.voice.alarm or len(self._coordinator.deployments) >= COORDINATED
        return not alone and demand.manifest_digest in self._cached()

    def _rank(self, demand: Demand, node: NodeId) -> int:
        """How many candidates come before `node`."""
        key, digest = demand.deployment, demand.manifest_digest
        entries = self._membership.roster.entries.items()
        place = self._place(key, node)
        those = (other for other, entry in entries if digest in entry.body.cached or self._holds(key, other))
        return sum(self._place(key, other) < place for other in those if other != node and self._is_there(other))

    def _place(self, key: str, node: NodeId) -> tuple[bool, NodeId]:
        """Who has a slice of it in memory comes first, then lower ids."""
        return not self._holds(key, node), node

    def _holds(self, key: str, node: NodeId) -> bool:
        if node == self._membership.node:
            return any(run.claim.deployment == key for run in self._ledger.held.values())
        entry = self._membership.roster.entries.get(node)
        return entry is not None and any(held.deployment == key for held in entry.body.reserved)

    def _is_there(self, node: NodeId) -> bool:
        entry, link = self._membership.roster.entries[node], self._membership.links.links.get(node)
        return entry.present and self._is_member(node) and (link is None or link.up)

    # --- several ------------------------------------------------------------------------------------------------

    def _yield(self, key: str, now: float) -> None:
        deployment = self._coordinator.deployments[key]
        if deployment.leaving:
            return
        for node, body in self._holders(key):
            link = self._membership.links.links.get(node)
            there = link is not None and link.up and now - link.heard_at <= SILENT_S
            if body is not None and key in body.coordinates and there and self._goes_first(node, body, key):
                self._out.trace(f"{deployment.demand.model}: given up to {body.name}, who coordinates it too")
                self._coordinator.give_up(key, now)
                return

    def _goes_first(self, node: NodeId, body: Body, key: str) -> bool:
        """Of two: who serves before who does not, then the higher (term, id); where none serves the author, then the
        better candidate."""
        deployment, own = self._coordinator.deployments[key], self._membership.node
        theirs = max((served.term for served in body.served if served.deployment == key), default=0)
        ours = deployment.current.fence.term if deployment.current is not None else 0
        if theirs or ours:
            return (theirs, node) > (ours, own)
        author = deployment.demand.author
        if author in (node, own):
            return author == node
        return node < own
