"""What a node says of itself: one signed, numbered record that travels unchanged.

Invariant: a signature covers the exact bytes that travel; nothing is encoded again to check it.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import msgspec

from meshnode.errors import PeerError
from meshnode.identity.domains import Domain
from meshnode.identity.ids import MeshId, NodeId, is_id
from meshnode.identity.revocation import RevocationList
from meshnode.wire.demand import DEPLOYMENT_CHARACTERS
from meshnode.wire.fence import RunId, Term
from meshnode.wire.limits import ADDRESSES
from meshnode.wire.messages import Announce

BODY_BYTES = 4096
"""An announcement: 2 KB as designed, and the room of one more for fields of later versions."""

NAME_CHARACTERS = 63
"""What a node may call itself (the bound of a host's label), and printable: it comes to other people's terminals."""

NUMBER = 2**53
"""Incarnations and sequences stay below: every language's number holds them, and the highest cannot be used up."""

WAYS = 16
"""Peers whose distance one announcement tells (NETWORK): 16 x 64 bytes; a pipeline has fewer neighbours."""

SPEEDS = 4
"""Kinds of weights whose speed it tells."""

KIND_CHARACTERS = 16
"""Of a kind's name: the longest of llama.cpp has eight."""

COORDINATED = 16
"""Deployments that one node coordinates: twice what it may be asked for itself, 20 bytes each."""

PROTOCOL = 1
"""Of the control messages; grows when an old node could not do without the change."""


class Served(msgspec.Struct, frozen=True):
    """A run that the author coordinates: where its head is, for clients of any node."""

    deployment: str
    model: str
    term: Term
    run: RunId
    context: int
    created: int
    """Unix seconds, for the models list."""


class Reserved(msgspec.Struct, frozen=True):
    """Memory of the author that a deployment holds, bytes."""

    deployment: str
    bytes: int


class Speed(msgspec.Struct, frozen=True, array_like=True):
    """How fast the author computes with one kind of weights; 0: not measured."""

    decode_bytes_per_s: int = 0
    """Weights read per second while one row is computed."""
    prefill_bytes_per_s: int = 0
    """The same, times the rows of a full chunk that are computed at once."""
    layer_us: int = 0
    """What every layer of a decode takes beside reading its weights: steps of the graph, threads meeting."""
    stage_us: int = 0
    """What a stage and its hop on loopback take a microbatch beside computing: the same for every kind."""


class Way(msgspec.Struct, frozen=True, array_like=True):
    """From a peer to the author, as the author measured it; 0: not measured."""

    rtt_us: int = 0
    bytes_per_s: int = 0


class Body(msgspec.Struct, frozen=True):
    """The signed content. Sizes are bytes."""

    mesh: MeshId
    node: NodeId
    incarnation: int
    """Boot counter, kept on disk."""
    sequence: int
    name: str
    addresses: tuple[str, ...]
    memory_usable: int
    protocol: int = PROTOCOL
    software: str = ""
    llama: str = ""
    reserved: tuple[Reserved, ...] = ()
    served: tuple[Served, ...] = ()
    cached: dict[str, tuple[tuple[int, int], ...]] = {}
    """Manifest digest -> layer ranges [first, last) that need not be fetched."""
    certificate: bytes = b""
    """Fingerprint of the author's present certificate: who knows another one asks for the chain."""
    left: bool = False
    """The last word of a node that goes away on purpose."""
    alarm: bool = False
    """The author met another node with its key and number, and takes part in no plan."""
    cores: int = 0
    """Cores that one stage may compute with; 0: not told."""
    speeds: dict[str, Speed] = {}
    """By kind of weights, as llama.cpp calls it in lower case: q8_0, q4_k, ..."""
    ways: dict[NodeId, Way] = {}
    """From the peers nearest to it."""
    draining: bool = False
    """The author takes no more work, and what it has shall go elsewhere."""
    coordinates: tuple[str, ...] = ()
    """Deployments that the author cares for, also while nothing serves them."""

    @property
    def number(self) -> tuple[int, int]:
        """What decides which of two announcements is newer."""
        return (self.incarnation, self.sequence)


class Author(Protocol):
    """A member whose chain was checked."""

    @property
    def node(self) -> NodeId:
        """Hash of the member's key."""
        ...

    @property
    def role(self) -> str:
        """member | client, as its issuer wrote it."""
        ...

    @property
    def issuer(self) -> NodeId:
        """Hash of the key that signed the member's certificate."""
        ...

    def signed(self, domain: Domain, data: bytes, signature: bytes) -> bool:
        """Whether `signature` is this member's over `data` in `domain` of this mesh."""
        ...


class Authority(Protocol):
    """This node's own key and its view of who belongs to the mesh. Pure: reads no file, no clock of its own."""

    @property
    def node(self) -> NodeId:
        """This node."""
        ...

    @property
    def mesh(self) -> MeshId:
        """Its mesh."""
        ...

    @property
    def chain(self) -> tuple[bytes, ...]:
        """This node's certificates, DER, leaf first, root left out."""
        ...

    def sign(self, domain: Domain, data: bytes) -> bytes:
        """A signature over `data` in `domain`."""
        ...

    def admit(self, chain: tuple[bytes, ...]) -> Author:
        """The author that `chain` proves. Raises PeerError when it proves none."""
        ...

    def revocations(self, chain: tuple[bytes, ...], body: bytes, signature: bytes) -> RevocationList:
        """The list in `body`, checked (identity/revocation). Raises PeerError when no issuer of the mesh signed it."""
        ...


def fingerprint(chain: tuple[bytes, ...]) -> bytes:
    """What an announcement says of its author's certificate: 16 bytes of the leaf's SHA-256."""
    return hashlib.sha256(chain[0]).digest()[:16]


def announce(body: Body, authority: Authority) -> Announce:
    """The signed record of `body`, whose lists the caller has cut to fit."""
    raw = msgspec.msgpack.encode(body)
    assert len(raw) <= BODY_BYTES, "an announcement outgrew its limit: cut its lists"
    return Announce(author=body.node, body=raw, signature=authority.sign(Domain.ANNOUNCEMENT, raw))


def read(record: Announce, author: Author, mesh: MeshId, *, verify: bool = True) -> Body:
    """The checked content of `record`. Raises PeerError for anything that its author did not sign for this mesh.

    `verify` is False only where the simulator proves that it finds a node that does not look at signatures.
    """
    if len(record.body) > BODY_BYTES:
        raise PeerError(f"an announcement of {len(record.body)} bytes, at most {BODY_BYTES} are allowed")
    if verify and not author.signed(Domain.ANNOUNCEMENT, record.body, record.signature):
        raise PeerError("an announcement with a wrong signature")
    try:
        body = msgspec.msgpack.decode(record.body, type=Body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PeerError(f"a malformed announcement: {error}") from None
    if body.node != author.node or body.node != record.author:
        raise PeerError("an announcement in another node's name")
    if body.mesh != mesh:
        raise PeerError("an announcement of another mesh")
    if not _is_possible(body):
        raise PeerError("an announcement with impossible values")
    return body


class _Named(msgspec.Struct):
    node: NodeId


def names_its_author(record: Announce) -> bool:
    """Whether the content is of whom the record says, signed or not: its id can then stand for nobody else's word."""
    try:
        return msgspec.msgpack.decode(record.body, type=_Named).node == record.author
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False


def _is_possible(body: Body) -> bool:
    texts = [body.name, body.software, body.llama, *body.addresses, *(held.deployment for held in body.reserved)]
    for served in body.served:
        texts += (served.deployment, served.model, served.run)
    layers = (layer for ranges in body.cached.values() for slice_ in ranges for layer in slice_)
    sizes = (*body.number, body.memory_usable, *(reserved.bytes for reserved in body.reserved), *layers)
    return (
        _is_measured(body)
        and len(body.addresses) <= ADDRESSES
        and len(body.coordinates) <= COORDINATED
        and all(len(deployment) <= DEPLOYMENT_CHARACTERS for deployment in body.coordinates)
        and len(body.name) <= NAME_CHARACTERS
        and min(sizes) >= 0
        and max(body.number) < NUMBER
        and all(text.isprintable() for text in texts)
    )


def _is_measured(body: Body) -> bool:
    values = [body.cores]
    for speed in body.speeds.values():
        values += (speed.decode_bytes_per_s, speed.prefill_bytes_per_s, speed.layer_us, speed.stage_us)
    for way in body.ways.values():
        values += (way.rtt_us, way.bytes_per_s)
    return (
        len(body.speeds) <= SPEEDS
        and len(body.ways) <= WAYS
        and all(is_id(node) for node in body.ways)
        and all(len(kind) <= KIND_CHARACTERS and kind.isprintable() for kind in body.speeds)
        and min(values) >= 0
        and max(values) < NUMBER
    )
