"""The demands known here: what shall be served, also while nobody serves it, and what shall not be any more.

Invariant: merging is commutative, associative and idempotent: of one deployment the highest (version, author, id)
counts, whoever brings it, so that what was removed comes back only by a later version; and it stays bounded, by a
rule that looks at nothing but the set: what one member asks for never keeps out what others ask for less of.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec

from meshnode.errors import ConfigError, PeerError
from meshnode.identity.domains import Domain
from meshnode.identity.ids import NodeId, is_id
from meshnode.wire.demand import DEPLOYMENT_CHARACTERS, Demand
from meshnode.wire.messages import DemandRecord

BODY_BYTES = 8192
"""Of a demand: 64 pinned and 64 excluded nodes take 7 KB."""
REMOVED_BYTES = 1024
"""Of one that was given up: it names a deployment and a model, and no nodes."""
CHAIN_BYTES = 4096
"""Three certificates of 700 bytes each in DER, and room."""
WANTED = 64
"""Deployments of a whole mesh: eight models on each of eight nodes. The oldest of every author stay, then the second
oldest of every author, and so on: who asks for more than its part loses its latest, and nobody else anything."""
REMOVED = 256
"""Given up and remembered, so that no node that was away brings them back: 8 a day for a month. The latest stay."""
REMEMBER_S = 30 * 24 * 3600
"""So long a removed demand is remembered over restarts (COORDINATION)."""
MODEL_CHARACTERS = 128
NODES = 64
CUTS = 64
NUMBER = 2**53
"""Numbers stay below: every language's number holds them, and the highest version cannot be used up by accident."""


class Signer(Protocol):
    """A member whose certificates were checked."""

    @property
    def node(self) -> NodeId:
        """Hash of the member's key."""
        ...

    @property
    def role(self) -> str:
        """member | client, as its issuer wrote it."""
        ...

    def signed(self, domain: Domain, data: bytes, signature: bytes) -> bool:
        """Whether `signature` is this member's over `data` in `domain` of this mesh."""
        ...


@dataclass(frozen=True)
class Known:
    """One demand: as it travels, and what it says."""

    record: DemandRecord
    demand: Demand

    @property
    def rank(self) -> tuple[int, NodeId, bytes]:
        """The higher one counts."""
        return self.demand.version, self.demand.author, hashlib.sha256(self.record.body).digest()

    @property
    def age(self) -> tuple[int, str]:
        """The order in which too many are cut."""
        return self.demand.created, self.demand.deployment


def encode_demand(demand: Demand) -> bytes:
    """What is signed. Raises ConfigError for one that no node would take."""
    raw = msgspec.msgpack.encode(demand)
    if not _fits(raw, demand):
        raise ConfigError("the model was asked for with options that no message holds", "Name fewer machines.")
    return raw


def read(record: DemandRecord, author: Signer, *, verify: bool = True) -> Demand:
    """The checked content. Raises PeerError for anything that a member of this mesh did not sign.

    `verify` is False only where the simulator proves that it finds a node that does not look at signatures.
    """
    if author.role != "member":
        raise PeerError("only members may ask for models")
    if len(record.body) > BODY_BYTES or sum(map(len, record.chain)) > CHAIN_BYTES:
        raise PeerError("an oversized demand")
    if verify and not author.signed(Domain.DEMAND, record.body, record.signature):
        raise PeerError("a demand with a wrong signature")
    demand = _decode(record)
    if demand.author != record.author or demand.author != author.node:
        raise PeerError("a demand in another node's name")
    return demand


class Merged(NamedTuple):
    """What merging one more did."""

    news: bool
    gone: list[DemandRecord]
    """Held until now, and no longer."""
    cut: list[DemandRecord]
    """Left out for want of room; the new one may be among them."""


class Demands:
    """All of them, by deployment."""

    def __init__(self) -> None:
        self.known: dict[str, Known] = {}
        self.changes = 0
        """How often it became another set."""

    def offer(self, record: DemandRecord, demand: Demand) -> Merged:
        """Merge one that was read."""
        new = Known(record, demand)
        before = self.known.get(demand.deployment)
        if before is not None and new.rank <= before.rank:
            return Merged(False, [], [])
        self.changes += 1
        gone = [] if before is None else [before.record]
        self.known[demand.deployment] = new
        cut = self._cut()
        gone += [each.record for each in cut if each is not new]
        return Merged(new not in cut, gone, [each.record for each in cut])

    def find(self, deployment: str) -> Demand | None:
        """What is known of it, wanted or removed."""
        known = self.known.get(deployment)
        return None if known is None else known.demand

    def wanted(self) -> list[Demand]:
        """Those that shall be served."""
        return [known.demand for known in self.known.values() if not known.demand.removed]

    @property
    def full(self) -> bool:
        """Whether one more would cost another its place."""
        return len(self.wanted()) >= WANTED

    def has_room(self, author: NodeId) -> bool:
        """Whether one more that `author` asks for now would stay."""
        turns = self._turns()
        own = sum(each.demand.author == author for _, each in turns)
        return sum(turn <= own for turn, _ in turns) < WANTED

    def encode(self) -> bytes:
        """What must survive a restart."""
        return msgspec.msgpack.encode(
            [(each.record.author, each.record.chain, each.record.body, each.record.signature) for each in self.ordered]
        )

    @property
    def ordered(self) -> list[Known]:
        """All, by deployment."""
        return [self.known[key] for key in sorted(self.known)]

    def restore(self, data: bytes, unix: int) -> None:
        """Take back what `encode` wrote, but what was removed long before `unix`. Raises ConfigError."""
        try:
            kept = msgspec.msgpack.decode(data, type=list[tuple[NodeId, tuple[bytes, ...], bytes, bytes]])
            for author, chain, body, signature in kept:
                record = DemandRecord(author, chain, body, signature)
                demand = _decode(record)  # whoever signed it was judged when it came
                if not (demand.removed and demand.created + REMEMBER_S < unix):
                    self.offer(record, demand)
        except (msgspec.MsgspecError, ValueError, PeerError) as error:
            raise ConfigError(
                f"the file `demands` in the data directory is damaged: {error}",
                "Delete it: models that other nodes of the mesh know of come back by themselves.",
            ) from None

    def _cut(self) -> list[Known]:
        wanted = [each for _, each in sorted(self._turns(), key=lambda told: (told[0], told[1].age))]
        removed = sorted((each for each in self.known.values() if each.demand.removed), key=lambda each: each.age)
        cut = wanted[WANTED:] + removed[: max(0, len(removed) - REMOVED)]
        for each in cut:
            del self.known[each.demand.deployment]
        return cut

    def _turns(self) -> list[tuple[int, Known]]:
        """What is wanted, each with how many older ones its author wants."""
        before: Counter[NodeId] = Counter()
        turns = []
        for each in sorted(
            (each for each in self.known.values() if not each.demand.removed), key=lambda each: each.age
        ):
            turns.append((before[each.demand.author], each))
            before[each.demand.author] += 1
        return turns


def _decode(record: DemandRecord) -> Demand:
    try:
        demand = msgspec.msgpack.decode(record.body, type=Demand)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PeerError(f"a malformed demand: {error}") from None
    if not _fits(record.body, demand):
        raise PeerError("a demand with impossible values")
    return demand


def _fits(raw: bytes, demand: Demand) -> bool:
    texts = (demand.deployment, demand.model, demand.manifest_digest, demand.kv_type)
    numbers = (demand.context, demand.lanes, demand.replicas, demand.created, *demand.cuts)
    return (
        len(raw) <= (REMOVED_BYTES if demand.removed else BODY_BYTES)
        and 0 < demand.version < NUMBER
        and all(0 <= number < NUMBER for number in numbers)
        and 0 < len(demand.deployment) <= DEPLOYMENT_CHARACTERS
        and len(demand.model) <= MODEL_CHARACTERS
        and len(demand.manifest_digest) == 64
        and all(text.isprintable() for text in texts)
        and len(demand.cuts) <= CUTS
        and max(len(demand.pins), len(demand.excludes)) <= NODES
        and all(is_id(node) for node in (*demand.pins, *demand.excludes))
    )
