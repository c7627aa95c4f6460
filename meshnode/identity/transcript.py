"""What is proven in a JOIN: knowledge of the invite's secret, and possession of the joiner's key.

Invariant: every part has a fixed length, so no two transcripts have the same bytes.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.identity.domains import Domain, bound, sign, verify
from meshnode.identity.ids import MeshId
from meshnode.identity.invites import INVITE_ID_BYTES
from meshnode.identity.keys import SPKI_BYTES, public_key_of

NONCE_BYTES = 32
FINGERPRINT_BYTES = 32
MAC_BYTES = 32
NO_INVITE = bytes(INVITE_ID_BYTES)


@dataclass(frozen=True)
class Transcript:
    """One JOIN: for which mesh and invite, with which nonces, over which TLS leaf, for which key."""

    mesh_id: MeshId
    invite_id: bytes
    issuer_nonce: bytes
    joiner_nonce: bytes
    leaf_fingerprint: bytes
    """SHA-256 of the issuer's TLS leaf: a proof shown to a man in the middle is of no use to him."""
    public_key: bytes
    """The joiner's, DER SubjectPublicKeyInfo."""
    domain: Domain = Domain.JOIN
    """JOIN, or RENEWAL: then there is no invite and its id is `NO_INVITE`."""

    def __post_init__(self) -> None:
        sizes = (INVITE_ID_BYTES, NONCE_BYTES, NONCE_BYTES, FINGERPRINT_BYTES, SPKI_BYTES)
        assert tuple(map(len, self._parts())) == sizes, "parts of a transcript have fixed lengths"

    def _parts(self) -> tuple[bytes, ...]:
        return self.invite_id, self.issuer_nonce, self.joiner_nonce, self.leaf_fingerprint, self.public_key

    def mac(self, key: bytes) -> bytes:
        """HMAC-SHA256 under the invite's key, 32 bytes."""
        return hmac.digest(key, bound(self.domain, self.mesh_id, b"".join(self._parts())), hashlib.sha256)

    def proves(self, key: bytes, mac: bytes) -> bool:
        """True when `mac` is right for `key`; compared in constant time."""
        return hmac.compare_digest(self.mac(key), mac)

    def sign(self, key: Ed25519PrivateKey) -> bytes:
        """The joiner's signature: it holds the private key of `public_key`."""
        return sign(key, self.domain, self.mesh_id, b"".join(self._parts()))

    def check_signature(self, signature: bytes) -> None:
        """`PeerError` unless the holder of `public_key` signed this."""
        verify(public_key_of(self.public_key), self.domain, self.mesh_id, b"".join(self._parts()), signature)


def fingerprint(der: bytes) -> bytes:
    """SHA-256 of a certificate."""
    return hashlib.sha256(der).digest()
