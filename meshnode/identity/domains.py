"""Every signature domain of meshnode, and signing under one.

Invariant: a signature covers its domain label, the mesh id and the exact bytes that travel, so that no
signed thing of one kind, version or mesh can be shown as another.
"""

from __future__ import annotations

from enum import StrEnum

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from meshnode.errors import PeerError
from meshnode.identity.ids import MeshId, id_bytes


class Domain(StrEnum):
    """What a signature, MAC or derived key is for; the version is the protocol's."""

    ANNOUNCEMENT = "meshnode/v1/announcement"
    SUSPICION = "meshnode/v1/suspicion"
    REVOCATION = "meshnode/v1/revocation"
    DEMAND = "meshnode/v1/demand"
    JOIN = "meshnode/v1/join"
    INVITE_KEY = "meshnode/v1/invite-key"
    INVITE_CHECKSUM = "meshnode/v1/invite-checksum"
    ISSUER_PIN = "meshnode/v1/issuer-pin"
    RENEWAL = "meshnode/v1/renewal"
    COMMITMENT = "meshnode/v1/commitment"
    COMPARISON = "meshnode/v1/comparison"
    ISSUER = "meshnode/v1/issuer"


def bound(domain: Domain, mesh_id: MeshId, data: bytes) -> bytes:
    """The bytes that are signed: label, zero byte (no label holds one), 32 bytes of mesh id, data."""
    return domain.value.encode() + b"\0" + id_bytes(mesh_id) + data


def sign(key: Ed25519PrivateKey, domain: Domain, mesh_id: MeshId, data: bytes) -> bytes:
    """64 bytes of Ed25519 signature."""
    return key.sign(bound(domain, mesh_id, data))


def verify(key: Ed25519PublicKey, domain: Domain, mesh_id: MeshId, data: bytes, signature: bytes) -> None:
    """Raise `PeerError` unless `signature` is `key`'s over exactly these bytes in this domain and mesh."""
    try:
        key.verify(signature, bound(domain, mesh_id, data))
    except InvalidSignature:
        raise PeerError(f"a signature of domain {domain.value} does not verify") from None
