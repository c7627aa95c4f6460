"""Real keys, certificates and signatures of a simulated mesh, the same for the same seed.

Signatures are really made and really checked, forged ones too; the verdict on the same bytes is remembered, because
256 nodes check the same announcement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from unittest.mock import patch

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from meshnode.core.membership.announcement import Body
from meshnode.errors import PeerError
from meshnode.identity.certificates import Authority as Signer
from meshnode.identity.certificates import Role, make_issuer, make_node, make_root
from meshnode.identity.chains import key_bytes, mesh_id_of_root, parse_certificate, peer_identity, verify_chain
from meshnode.identity.domains import Domain, sign, verify
from meshnode.identity.ids import MeshId, NodeId, node_id_of
from meshnode.identity.keys import public_key_of, spki_of
from meshnode.identity.revocation import RevocationList, read_list, sign_list
from meshnode.wire.messages import Revoke

BEGIN = datetime(2030, 1, 1, tzinfo=UTC)
"""What calendars show when virtual time is 0."""


def private_key(*purpose: object) -> Ed25519PrivateKey:
    """The key of one purpose."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256("/".join(map(str, purpose)).encode()).digest())


@dataclass
class Verifier:
    """Remembers verdicts by the exact bytes that were judged."""

    verdicts: dict[tuple[bytes, str, bytes, bytes], bool] = field(default_factory=dict)
    chains: dict[tuple[tuple[bytes, ...], int], SimulatedAuthor | str] = field(default_factory=dict)
    forged: int = 0

    def signed(self, key: Ed25519PublicKey, spki: bytes, mesh: MeshId, claim: tuple[Domain, bytes, bytes]) -> bool:
        """Whether `claim` (domain, data, signature) is a signature of `key`."""
        domain, data, signature = claim
        known = self.verdicts.get((spki, domain, data, signature))
        if known is None:
            try:
                verify(key, domain, mesh, data, signature)
                known = True
            except PeerError:
                known = False
                self.forged += 1
            self.verdicts[spki, domain, data, signature] = known
        return known


@dataclass(frozen=True)
class SimulatedAuthor:
    """A member whose chain was checked."""

    node: NodeId
    role: str
    issuer: NodeId
    key: Ed25519PublicKey = field(repr=False)
    spki: bytes = field(repr=False)
    mesh: MeshId = field(repr=False)
    verifier: Verifier = field(repr=False, compare=False)

    def signed(self, domain: Domain, data: bytes, signature: bytes) -> bool:
        """Whether `signature` is this member's over `data`."""
        return self.verifier.signed(self.key, self.spki, self.mesh, (domain, data, signature))


@dataclass
class Mint:
    """The root and issuer of one mesh, and everything that was ever signed in it."""

    seed: int
    verifier: Verifier = field(default_factory=Verifier)
    signed: dict[NodeId, dict[bytes, Domain]] = field(default_factory=dict)
    """By node, whatever it signed: an applied record that is not here was forged."""

    revoked: list[NodeId] = field(default_factory=list)
    lists: int = 0
    last_list: Revoke | None = None

    def __post_init__(self) -> None:
        root = private_key(self.seed, "root")
        with self._serials("root"):
            self.root = make_root(root, BEGIN)
            issuer = private_key(self.seed, "issuer")
            self.issuer = Signer(make_issuer(Signer(self.root, root), issuer.public_key(), BEGIN), issuer)
        self.root_key = root
        self.mesh = mesh_id_of_root(self.root)

    def member(self, name: str, now: Callable[[], float], role: Role = Role.MEMBER) -> SimulatedAuthority:
        """A node of this mesh; the same name gives the same key, chain and id."""
        key = private_key(self.seed, "node", name)
        with self._serials(name):
            leaf = make_node(self.issuer, key.public_key(), role, BEGIN)
        chain = tuple(certificate.public_bytes(Encoding.DER) for certificate in (leaf, self.issuer.certificate))
        return SimulatedAuthority(self, key, leaf, chain, now)

    def stranger_of(self, member: SimulatedAuthority) -> tuple[tuple[bytes, ...], Ed25519PrivateKey, bytes]:
        """What a minted member would show: a chain for a fresh key that a member signed itself; key and public key."""
        with self._serials(f"minted by {member.node}"):
            key = private_key(self.seed, "minted", member.node)
            leaf = make_node(Signer(member.leaf, member.key), key.public_key(), Role.MEMBER, BEGIN)
        return (leaf.public_bytes(Encoding.DER), *member.chain), key, spki_of(key.public_key())

    def revoke(self, nodes: list[NodeId]) -> None:
        """The issuer's next list: `nodes` are no members any more, and those of its lists before."""
        self.revoked += [node for node in nodes if node not in self.revoked]
        self.lists += 1
        raw, signature = sign_list(self.issuer.key, self.mesh, self.lists, self.revoked)
        self.last_list = Revoke((self.issuer.certificate.public_bytes(Encoding.DER),), raw, signature)

    @contextmanager
    def _serials(self, purpose: str) -> Iterator[None]:
        """Serial numbers are the one random thing in a certificate; here they follow from the seed."""
        digest = hashlib.sha256(f"{self.seed}/serial/{purpose}".encode()).digest()
        with patch.object(x509, "random_serial_number", lambda: int.from_bytes(digest[:16], "big") >> 1):
            yield


class SimulatedAuthority:
    """core.membership.Authority over real certificates and virtual calendars."""

    def __init__(
        self,
        mint: Mint,
        key: Ed25519PrivateKey,
        leaf: x509.Certificate,
        chain: tuple[bytes, ...],
        now: Callable[[], float],
    ) -> None:
        self.mint, self.key, self.leaf, self.chain = mint, key, leaf, chain
        self.mesh = mint.mesh
        self.node = peer_identity(leaf).node_id
        self._now = now
        self.announced_at = 0.0
        self.announced = (0, 0)
        """Number of the last announcement."""

    def sign(self, domain: Domain, data: bytes) -> bytes:
        """This node's signature, noted down for the checkers."""
        self.mint.signed.setdefault(self.node, {})[data] = domain
        if domain is Domain.ANNOUNCEMENT:
            self.announced_at = self._now()
            self.announced = msgspec.msgpack.decode(data, type=Body).number
        return sign(self.key, domain, self.mesh, data)

    def admit(self, chain: tuple[bytes, ...]) -> SimulatedAuthor:
        """The author that `chain` proves. Raises PeerError when it proves none."""
        verifier = self.mint.verifier
        now = self._now()
        hour = int(now // 3600)
        known = verifier.chains.get((chain, hour))
        if known is None:
            try:
                known = self._judge(chain, BEGIN + timedelta(seconds=now))
            except PeerError as error:
                known = str(error)
            verifier.chains[chain, hour] = known
        if isinstance(known, str):
            raise PeerError(known)
        return known

    def revocations(self, chain: tuple[bytes, ...], body: bytes, signature: bytes) -> RevocationList:
        """The list in `body`. Raises PeerError unless an issuer or the root signed it."""
        return read_list(chain, body, signature, self.mint.root)

    def _judge(self, chain: tuple[bytes, ...], now: datetime) -> SimulatedAuthor:
        certificates = [parse_certificate(der) for der in chain]
        verify_chain(certificates, self.mint.root, now)
        who, spki = peer_identity(certificates[0]), key_bytes(certificates[0])
        issuer = node_id_of(key_bytes(certificates[1]))
        key = public_key_of(spki)
        return SimulatedAuthor(who.node_id, who.role.value, issuer, key, spki, self.mesh, self.mint.verifier)
