"""The core's view of keys and certificates, made from what the data directory holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from meshnode.errors import PeerError
from meshnode.identity.chains import key_bytes, parse_certificate, peer_identity, verify_chain
from meshnode.identity.credentials import Credentials
from meshnode.identity.domains import Domain, sign, verify
from meshnode.identity.ids import MeshId, NodeId, node_id_of
from meshnode.identity.keys import public_key_of
from meshnode.identity.revocation import RevocationList, read_list


@dataclass(frozen=True)
class CertifiedAuthor:
    """A member whose chain ends in the mesh root."""

    node: NodeId
    role: str
    issuer: NodeId
    key: Ed25519PublicKey
    mesh: MeshId

    def signed(self, domain: Domain, data: bytes, signature: bytes) -> bool:
        """Whether `signature` is this member's."""
        try:
            verify(self.key, domain, self.mesh, data, signature)
        except PeerError:
            return False
        return True


class NodeAuthority:
    """core.membership.Authority over real certificates; `now` is the wall clock, for validity only."""

    def __init__(self, credentials: Callable[[], Credentials], now: Callable[[], datetime]) -> None:
        """`credentials` gives what is valid at present: certificates are renewed while the node runs."""
        self._credentials = credentials
        self.node = credentials().node_id
        self.mesh = credentials().mesh_id
        self._now = now

    @property
    def chain(self) -> tuple[bytes, ...]:
        """DER, leaf first."""
        return tuple(certificate.public_bytes(Encoding.DER) for certificate in self._credentials().chain)

    def sign(self, domain: Domain, data: bytes) -> bytes:
        """This node's signature."""
        return sign(self._credentials().key, domain, self.mesh, data)

    def admit(self, chain: tuple[bytes, ...]) -> CertifiedAuthor:
        """The author `chain` proves; PeerError when it proves none."""
        certificates = [parse_certificate(der) for der in chain]
        verify_chain(certificates, self._credentials().root, self._now())
        leaf = certificates[0]
        who = peer_identity(leaf)
        issuer = node_id_of(key_bytes(certificates[1] if len(certificates) > 1 else self._credentials().root))
        return CertifiedAuthor(who.node_id, who.role.value, issuer, public_key_of(key_bytes(leaf)), self.mesh)

    def revocations(self, chain: tuple[bytes, ...], body: bytes, signature: bytes) -> RevocationList:
        """The list in `body`; PeerError when no issuer of this mesh signed it."""
        return read_list(chain, body, signature, self._credentials().root)
