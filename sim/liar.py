"""A member that lies: it has a real key and real links, and says on them what no honest node would.

flipped      another's announcement with one byte changed         must never be applied
forged       another's announcement with a new number, signed by the liar
replayed     another's announcement that was newer once
minted       a member that the liar made itself, and its announcement
wrong mesh   its own announcement of another mesh, really signed
false claim  a claim in another node's name
false order  an order for a run of another coordinator, of which its peer holds a stage
false list   a revocation list of the liar's own making, in its own name and in the issuer's
false demand a demand in another node's name, or another's with more in it
slander      a suspicion against a node that lives: really signed, to be refuted
noise        bytes that are no message
equivocated  another announcement of its own under the number of its last (a copied key looks the same)
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import msgspec

from meshnode.core.membership.announcement import Body
from meshnode.core.membership.suspicion import Suspicion, suspect
from meshnode.identity.chains import key_bytes
from meshnode.identity.domains import Domain, sign
from meshnode.identity.ids import MeshId, NodeId, node_id_of
from meshnode.identity.revocation import RevocationList, sign_list
from meshnode.wire.demand import Demand, DeploymentId
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.messages import (
    Abort,
    Announce,
    Claim,
    ClaimedStage,
    Commit,
    Connect,
    DemandRecord,
    FenceOff,
    Introduce,
    Renew,
    Revoke,
    RunOptions,
    encode,
)
from sim.agenda import stream
from sim.network import End

if TYPE_CHECKING:
    from sim.machine import Machine
    from sim.world import World

EVERY_S = 0.4
KEPT = 64
"""Old announcements of others that it can replay."""
KINDS = (
    "flipped",
    "forged",
    "replayed",
    "minted",
    "wrong_mesh",
    "false_claim",
    "false_order",
    "noise",
    "equivocated",
    "false_list",
    "slander",
    "false_demand",
)
FORGED = ("flipped", "forged", "replayed", "minted", "wrong_mesh", "false_claim", "false_list", "false_demand")
"""Those that nobody may ever believe; the others are really signed, or nothing at all."""


class Liar:
    """Sends forgeries on the links of one machine until `until`."""

    def __init__(
        self,
        world: World,
        machine: Machine,
        until: float,
        every_s: float = EVERY_S,
        kinds: tuple[str, ...] = KINDS,
    ) -> None:
        self.world, self.machine, self.until, self.every_s, self.kinds = world, machine, until, every_s, kinds
        self.random: Random = stream(world.seed, "liar", machine.name)
        self.told: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.kept: list[Announce] = []

    def begin(self) -> None:
        """Lie now and then."""
        self.world.agenda.after(self.random.expovariate(1 / self.every_s), self._again)

    def _again(self) -> None:
        if self.world.now >= self.until:
            return
        if self.machine.mediator is not None and not self.machine.paused:
            self.tell(self.random.choice(self.kinds))
        self.begin()

    def tell(self, kind: str) -> None:
        """Put one lie of this kind on one link."""
        links = list(self.machine.links.values())
        mediator = self.machine.mediator
        if not links or mediator is None:
            return
        entries = [entry.record for node, entry in mediator.roster.entries.items() if node != self.machine.node]
        self.kept = (self.kept + entries)[-KEPT:]
        end = self.random.choice(links)
        frames = self._frames(kind, end)
        self.told[kind] += bool(frames)
        for frame in frames:
            self.world.network.send(end, frame)

    def _frames(self, kind: str, end: End) -> list[bytes]:
        match kind:
            case "noise":
                return [self.random.randbytes(self.random.randint(1, 200))]
            case "minted":
                return self._minted()
            case "wrong_mesh":
                return self._wrong_mesh()
            case "false_claim":
                return self._false_claim(end)
            case "false_order":
                return self._false_order(end)
            case "false_list":
                return self._false_list()
            case "slander":
                return self._slander()
            case "false_demand":
                return self._false_demand()
            case "equivocated":
                return self._equivocated()
        if not self.kept:
            return []
        record = self.random.choice(self.kept)
        introduction = encode(Introduce(self.world.machines[record.author].authority.chain))
        match kind:
            case "flipped":
                at = self.random.randrange(len(record.body))
                body = (
                    record.body[:at]
                    + bytes([record.body[at] ^ (1 << self.random.randrange(8))])
                    + record.body[at + 1 :]
                )
                return [introduction, encode(Announce(record.author, body, record.signature))]
            case "forged":
                told = msgspec.msgpack.decode(record.body, type=Body)
                raw = msgspec.msgpack.encode(msgspec.structs.replace(told, sequence=told.sequence + 1000))
                return [introduction, encode(Announce(record.author, raw, self._signed(raw)))]
            case _:
                return [introduction, encode(record)]

    def _signed(self, raw: bytes) -> bytes:
        """With the liar's key, past the book in which the checkers look up what was signed."""
        return sign(self.machine.authority.key, Domain.ANNOUNCEMENT, self.world.mint.mesh, raw)

    def _minted(self) -> list[bytes]:
        chain, key, spki = self.world.mint.stranger_of(self.machine.authority)
        body = self._body(node_id_of(spki), self.world.mint.mesh)
        raw = msgspec.msgpack.encode(body)
        signature = sign(key, Domain.ANNOUNCEMENT, self.world.mint.mesh, raw)
        return [encode(Introduce(chain)), encode(Announce(body.node, raw, signature))]

    def _wrong_mesh(self) -> list[bytes]:
        other = MeshId(node_id_of(b"another mesh"))
        raw = msgspec.msgpack.encode(self._body(self.machine.node, other))
        signature = sign(self.machine.authority.key, Domain.ANNOUNCEMENT, other, raw)
        return [encode(Announce(self.machine.node, raw, signature))]

    def _false_list(self) -> list[bytes]:
        mint, authority = self.world.mint, self.machine.authority
        victim = self.random.choice(list(self.world.machines))
        raw, signature = sign_list(authority.key, mint.mesh, 99, [victim])
        told = RevocationList(mint.mesh, node_id_of(key_bytes(mint.issuer.certificate)), 99, (victim,))
        stolen = msgspec.msgpack.encode(told)
        issuer = authority.chain[1:]
        forged = sign(authority.key, Domain.REVOCATION, mint.mesh, stolen)
        return [
            encode(self.random.choice((Revoke(authority.chain[:1], raw, signature), Revoke(issuer, stolen, forged))))
        ]

    def _slander(self) -> list[bytes]:
        assert self.machine.mediator is not None
        told = [entry.body for entry in self.machine.mediator.roster.entries.values()]
        if not told:
            return []
        body, authority = self.random.choice(told), self.machine.authority
        false = Suspicion(body.mesh, authority.node, body.node, *body.number, alone=True)
        return [encode(suspect(false, authority))]

    def _false_demand(self) -> list[bytes]:
        """A model that nobody asked for, or the end of one that somebody did."""
        assert self.machine.mediator is not None
        others = [machine for machine in self.world.machines.values() if machine.node != self.machine.node]
        mint, victim = self.world.mint, self.random.choice(others)
        known = list(self.machine.mediator.register.demands.known.values())
        wanted = Demand(DeploymentId(self.random.randbytes(8).hex()), 1, victim.node, "0" * 64, "false")
        if known and self.random.random() < 0.7:
            told = self.random.choice(known).demand
            removed = not told.removed
            wanted = msgspec.structs.replace(told, author=victim.node, version=told.version + 1, removed=removed)
        raw = msgspec.msgpack.encode(wanted)
        signature = sign(self.machine.authority.key, Domain.DEMAND, mint.mesh, raw)
        return [encode(DemandRecord(victim.node, victim.authority.chain, raw, signature))]

    def _equivocated(self) -> list[bytes]:
        """Really signed, so it may be believed; but it must not keep anybody from hearing the next one."""
        authority = self.machine.authority
        self.world.doubled.add(self.machine.node)
        number = authority.announced
        body = self._body(self.machine.node, self.world.mint.mesh)
        body = msgspec.structs.replace(body, incarnation=number[0], sequence=number[1])
        raw = msgspec.msgpack.encode(body)
        return [encode(Announce(body.node, raw, authority.sign(Domain.ANNOUNCEMENT, raw)))]

    def _body(self, node: NodeId, mesh: MeshId) -> Body:
        name = f"{self.machine.name}-false"
        return Body(mesh, node, 1 << 20, 1, name, (f"{name}:1",), self.machine.me.memory_usable)

    def _false_claim(self, end: End) -> list[bytes]:
        peer = self.world.node_at[end.peer]
        others = [node for node in self.world.machines if node not in (self.machine.node, peer)]
        if not others:
            return []
        fence = Fence(Term(5), RunId(self.random.randbytes(8).hex()))
        options = RunOptions(256, 4, 128, "f16", flash_attention=False)
        stage = ClaimedStage(0, peer, 0, 12, 1, 1, 2)
        claim = Claim(fence, "f" * 16, "model", "0" * 64, "0" * 64, self.random.choice(others), 12, options, (stage,))
        return [encode(claim)]

    def _false_order(self, end: End) -> list[bytes]:
        """As a participant could: it knows the fence of a run that it does not coordinate."""
        peer = self.world.machines[end.peer].mediator
        held = [] if peer is None else list(peer.ledger.held.values())
        runs = [run.claim for run in held if run.claim.coordinator != self.machine.node]
        if not runs:
            return []
        claim = self.random.choice(runs)
        later = Fence(Term(claim.fence.term + 1), claim.fence.run)
        orders = (
            Abort(claim.fence, "false"),
            Connect(claim.fence),
            Commit(claim.fence),
            Renew(claim.fence, 1),
            FenceOff(self.random.choice((claim.fence, later)), claim.deployment),
        )
        return [encode(self.random.choice(orders))]
