"""What a node holds once it belongs to a mesh: its key, its chain, the root."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from meshnode.identity.certificates import Authority, Role
from meshnode.identity.chains import mesh_id_of_root, peer_identity
from meshnode.identity.ids import MeshId, NodeId, node_id_of
from meshnode.identity.keys import spki_of


@dataclass(frozen=True)
class Credentials:
    """`chain` is leaf first and does not hold the root. Also a stage's: then there is no role."""

    key: Ed25519PrivateKey = field(repr=False)
    chain: tuple[x509.Certificate, ...]
    root: x509.Certificate

    @property
    def node_id(self) -> NodeId:
        """The hash of the key."""
        return node_id_of(spki_of(self.key.public_key()))

    @property
    def mesh_id(self) -> MeshId:
        """The hash of the root's key."""
        return mesh_id_of_root(self.root)

    @property
    def role(self) -> Role:
        """What the certificate says; `PeerError` for a stage's."""
        return peer_identity(self.chain[0]).role

    @property
    def expires(self) -> datetime:
        """When the first certificate of the chain ends."""
        return min(certificate.not_valid_after_utc for certificate in self.chain)

    @property
    def authority(self) -> Authority:
        """This node as the signer of its stages."""
        return Authority(self.chain[0], self.key)

    @property
    def chain_pem(self) -> bytes:
        """Leaf first, as `ssl` wants it."""
        return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in self.chain)

    @property
    def root_pem(self) -> bytes:
        """The only trust anchor."""
        return self.root.public_bytes(Encoding.PEM)
