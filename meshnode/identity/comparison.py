"""Joining without an invite: one number that two people compare, bound to both ends of one connection.

The issuer commits to its nonce before it sees the joiner's, and reveals it after: whoever stands in between has to
choose everything of his own blind, so he matches the other number once in 10^6 attempts, and there are 10 an hour.
"""

from __future__ import annotations

import hashlib
import hmac

from meshnode.errors import PeerError
from meshnode.identity.domains import Domain, bound
from meshnode.identity.ids import MeshId
from meshnode.identity.transcript import FINGERPRINT_BYTES, NONCE_BYTES, Transcript

DIGITS = 6
"""A person compares them at a glance; see above for what is left to chance."""
COMMITMENT_BYTES = 32


def commit(mesh_id: MeshId, leaf_fingerprint: bytes, nonce: bytes) -> bytes:
    """What the issuer says before its nonce, 32 bytes: SHA-256, which tells nothing about 32 random bytes."""
    assert (len(leaf_fingerprint), len(nonce)) == (FINGERPRINT_BYTES, NONCE_BYTES)
    return hashlib.sha256(bound(Domain.COMMITMENT, mesh_id, leaf_fingerprint + nonce)).digest()


def check_reveal(transcript: Transcript, commitment: bytes) -> None:
    """`PeerError` unless the transcript's issuer nonce is the one committed to."""
    expected = commit(transcript.mesh_id, transcript.leaf_fingerprint, transcript.issuer_nonce)
    if not hmac.compare_digest(expected, commitment):
        raise PeerError("the issuer reveals another nonce than it committed to")


def number(transcript: Transcript) -> str:
    """The six digits that both ends show: of the mesh, the issuer's TLS leaf, the joiner's key and both nonces."""
    parts = transcript.leaf_fingerprint + transcript.public_key + transcript.issuer_nonce + transcript.joiner_nonce
    digest = hashlib.sha256(bound(Domain.COMPARISON, transcript.mesh_id, parts)).digest()
    return f"{int.from_bytes(digest) % 10**DIGITS:0{DIGITS}d}"


def spoken(digits: str) -> str:
    """`123 456`: as people read it aloud."""
    return f"{digits[:3]} {digits[3:]}"
