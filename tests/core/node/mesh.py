"""A few mediators in one thread, joined by perfect links with a delay: the smallest world in which they decide.

Keys and certificates are stood in for by hashes (their real checks have tests of their own); everything else is the
real core. Effects that need a machine are answered by `World` the way a healthy machine would, unless a test says
otherwise by `hooks`.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from meshnode.core.membership.rules import RULES, Rules
from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.core.node.mediator import Mediator, NodeRules, Self
from meshnode.core.node.snapshot import status
from meshnode.core.node.status import NodeStatus
from meshnode.core.planning import Demand, make_plan
from meshnode.core.planning.footprint import LayerFootprint, ModelFootprint
from meshnode.errors import PeerError
from meshnode.identity.domains import Domain
from meshnode.identity.ids import MeshId, NodeId, node_id_of
from meshnode.identity.revocation import RevocationList
from meshnode.wire.demand import DeploymentId
from meshnode.wire.fence import Fence
from meshnode.wire.messages import AnyMessage, Connected, Failed, Fetched, Progress, Ready, Revoke, decode, encode

MESH = MeshId(node_id_of(b"mesh"))
ISSUER = node_id_of(b"issuer")
DELAY_S = 0.01
MB = 1_000_000


def name_to_id(name: str) -> NodeId:
    return node_id_of(name.encode())


@dataclass(frozen=True)
class HashAuthor:
    node: NodeId
    role: str
    issuer: NodeId = ISSUER

    def signed(self, domain: Domain, data: bytes, signature: bytes) -> bool:
        return signature == hashlib.sha256(self.node.encode() + domain.encode() + data).digest()


@dataclass(frozen=True)
class HashAuthority:
    """A chain is (b"member", id); whoever has it as `chain` is believed."""

    node: NodeId
    role: str = "member"
    mesh: MeshId = MESH

    @property
    def chain(self) -> tuple[bytes, ...]:
        return (self.role.encode(), self.node.encode())

    def sign(self, domain: Domain, data: bytes) -> bytes:
        return hashlib.sha256(self.node.encode() + domain.encode() + data).digest()

    def admit(self, chain: tuple[bytes, ...]) -> HashAuthor:
        if len(chain) != 2 or chain[0] not in (b"member", b"client"):
            raise PeerError("no chain")
        return HashAuthor(NodeId(chain[1].decode()), chain[0].decode())

    def revocations(self, chain: tuple[bytes, ...], body: bytes, signature: bytes) -> RevocationList:
        told = msgspec.msgpack.decode(body, type=RevocationList)
        if signature != hashlib.sha256(told.issuer.encode() + b"revocation" + body).digest():
            raise PeerError("a wrong signature")
        return told


def revocation(version: int, *nodes: NodeId, issuer: NodeId = ISSUER) -> Revoke:
    body = msgspec.msgpack.encode(RevocationList(MESH, issuer, version, nodes))
    return Revoke((b"issuer",), body, hashlib.sha256(issuer.encode() + b"revocation" + body).digest())


def footprint(layers: int = 9, layer_mb: int = 100, name: str = "model") -> ModelFootprint:
    return ModelFootprint(
        manifest_digest=hashlib.sha256(name.encode()).hexdigest(),
        name=name,
        architecture="llama",
        width=64,
        vocabulary=1000,
        context_trained=1024,
        layers=tuple(LayerFootprint(layer_mb * MB, 64) for _ in range(layers)),
        embedding_bytes=MB,
        output_bytes=MB,
        boundaries=tuple(range(1, layers)),
    )


@dataclass
class World:
    """Virtual time, and every node's mediator."""

    now: float = 0.0
    nodes: dict[str, Mediator] = field(default_factory=dict)
    queue: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    cut: set[frozenset[NodeId]] = field(default_factory=set)
    hooks: list[Callable[[str, do.Effect], bool]] = field(default_factory=list)
    log: list[tuple[str, do.Effect]] = field(default_factory=list)
    persisted: dict[str, bytes] = field(default_factory=dict)
    kept: dict[str, bytes] = field(default_factory=dict)
    """Demands on disk."""
    models: dict[str, ModelFootprint] = field(default_factory=dict)
    """By manifest digest; whoever loaded a slice of one has what a head needs."""
    cached: dict[str, dict[str, tuple[tuple[int, int], ...]]] = field(default_factory=dict)
    """Slices on disk, by node and manifest digest."""
    rules: Rules = RULES
    streams_s: float = 1.0
    """How long answers under way take when a head is to drain."""
    _counter: int = 0

    def add(self, name: str, memory_mb: int, *, role: str = "member", incarnation: int = 1) -> Mediator:
        node = name_to_id(name)
        me = Self(name, role, (f"{name}:1",), memory_mb * MB, incarnation)
        draws = iter(range(1, 1 << 30))

        def draw(count: int) -> bytes:
            return hashlib.sha256(f"{name}/{incarnation}/{next(draws)}".encode()).digest()[:count]

        mediator = Mediator(me, HashAuthority(node, role), draw, self.now, NodeRules(self.rules))
        if name in self.persisted:
            mediator.ledger.restore(self.persisted[name])
        if name in self.kept:
            mediator.register.restore(self.kept[name], 0)
        self.nodes[name] = mediator
        self.hand(name, on.CacheChanged(dict(self.cached.get(name, {}))))
        return mediator

    def meet(self, *names: str) -> None:
        """Tell each of the first's address; gossip does the rest."""
        for name in names[1:]:
            self.hand(name, on.PeerFound(name_to_id(names[0]), (f"{names[0]}:1",)))

    def serve(self, name: str, model: ModelFootprint | None = None, deployment: str = "d1", lanes: int = 4) -> None:
        model = model or footprint()
        self.models[model.manifest_digest] = model
        node = name_to_id(name)
        demand = Demand(DeploymentId(deployment), 1, node, model.manifest_digest, model.name, context=256, lanes=lanes)
        self.hand(name, on.Demanded(demand, model, 0))

    def hand(self, name: str, event: on.Event) -> None:
        for effect in self.nodes[name].handle(event, self.now):
            self.log.append((name, effect))
            if not any(hook(name, effect) for hook in self.hooks):
                self._do(name, effect)

    def run(self, seconds: float) -> None:
        """Let time pass: deliveries and deadlines in order."""
        end = self.now + seconds
        while True:
            due = [(mediator.deadline(), name) for name, mediator in sorted(self.nodes.items())]
            wake = min(((at, name) for at, name in due if at is not None), default=(end + 1, ""))
            arrival = self.queue[0][0] if self.queue else end + 1
            if min(wake[0], arrival) > end:
                self.now = end
                return
            if arrival <= wake[0]:
                self.now, _, act = heapq.heappop(self.queue)
                act()
            else:
                self.now = max(self.now, wake[0])
                self.hand(wake[1], on.TimePassed())

    def status(self, name: str) -> NodeStatus:
        return status(self.nodes[name], self.now, api_url="", issuer=False)

    def crash(self, name: str) -> None:
        """The process dies: every link of it ends at once."""
        gone = self.nodes.pop(name)
        for other, mediator in self.nodes.items():
            if mediator.links.up(gone.node):
                self.hand(other, on.LinkClosed(gone.node, "reset"))

    def later(self, act: Callable[[], None], delay: float = DELAY_S) -> None:
        self._counter += 1
        heapq.heappush(self.queue, (self.now + delay, self._counter, act))

    def report(self, name: str, report: Progress | Fetched | Ready | Connected | Failed) -> None:
        self.later(lambda: self._hand_if_there(name, on.StageReported(report)))

    def sent(self, kind: type) -> list[AnyMessage]:
        return [e.message for _, e in self.log if isinstance(e, do.Send) and isinstance(e.message, kind)]

    def effects(self, name: str, kind: type) -> list[do.Effect]:
        return [effect for owner, effect in self.log if owner == name and isinstance(effect, kind)]

    def _hand_if_there(self, name: str, event: on.Event) -> None:
        if name in self.nodes:
            self.hand(name, event)

    def _name(self, node: NodeId) -> str | None:
        return next((name for name, mediator in self.nodes.items() if mediator.node == node), None)

    def _do(self, name: str, effect: do.Effect) -> None:
        node = self.nodes[name].node
        match effect:
            case do.Dial(node=other):
                self.later(lambda: self._dialed(name, other))
            case do.Send(peer=peer, message=message):
                frame = encode(message)
                self.later(lambda: self._deliver(node, peer, frame))
            case do.CloseLink(peer=peer, reason=reason):
                self.later(lambda: self._closed(node, peer, reason))
            case do.Persist() | do.KeepDemands():
                self._write(name, effect)
            case do.OpenModel(demand=demand):
                opened = on.ModelOpened(demand.deployment, self.models[demand.manifest_digest])
                self.later(lambda: self._hand_if_there(name, opened), 0.5)
            case do.MakePlan():
                outcome = make_plan(effect.demand, effect.footprint, effect.inventory)
                self.later(lambda: self._hand_if_there(name, on.Planned(effect.deployment, effect.serial, outcome)))
            case do.PrepareStage(order=order) if order.hold:
                self.report(name, Fetched(order.fence, order.stage))
            case do.PrepareStage(order=order):
                self.report(name, Progress(order.fence, order.stage, "loading", 1000, 1000))
                self.report(name, Ready(order.fence, order.stage))
                held = self.cached.setdefault(name, {})
                if (order.first, order.last) not in held.get(order.manifest_digest, ()):
                    held[order.manifest_digest] = (*held.get(order.manifest_digest, ()), (order.first, order.last))
                    self.later(lambda: self._hand_if_there(name, on.CacheChanged(dict(held))))
            case do.ConnectStages(fence=fence):
                held = self.nodes[name].ledger.held[fence]
                for stage in held.own(node):
                    self.report(name, Connected(fence, stage.stage))
            case do.DrainHead(fence=drained):
                self.later(lambda: self._hand_if_there(name, on.HeadDrained(drained)), self.streams_s)
            case do.OpenHead(claim=claim):
                fence: Fence = claim.fence
                self.later(lambda: self._hand_if_there(name, on.HeadOpened(fence)), 0.05)
            case _:
                pass

    def _write(self, name: str, effect: do.Persist | do.KeepDemands) -> None:
        if isinstance(effect, do.Persist):
            self.persisted[name] = effect.ledger
        else:
            self.kept[name] = effect.demands

    def _dialed(self, name: str, other: NodeId) -> None:
        if name not in self.nodes:
            return
        own, target = self.nodes[name].node, self._name(other)
        if target is None or frozenset((own, other)) in self.cut:
            self.hand(name, on.LinkClosed(other, "no answer"))
            return
        if self.nodes[name].links.up(other):
            return
        self.hand(target, on.LinkOpened(own))
        self.hand(name, on.LinkOpened(other))

    def _deliver(self, source: NodeId, target: NodeId, frame: bytes) -> None:
        name = self._name(target)
        if name is not None and frozenset((source, target)) not in self.cut and self.nodes[name].links.up(source):
            self.hand(name, on.Received(source, decode(frame)))

    def _closed(self, one: NodeId, two: NodeId, reason: str) -> None:
        for a, b in ((one, two), (two, one)):
            name = self._name(a)
            if name is not None and self.nodes[name].links.up(b):
                self.hand(name, on.LinkClosed(b, reason))
