"""Ed25519 keys as bytes and back.

Invariant: a public key that came from outside is accepted only in its one canonical encoding, because
the hash of that encoding is an identity.
"""

from __future__ import annotations

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
)

from meshnode.errors import PeerError

SPKI_BYTES = 44
"""DER SubjectPublicKeyInfo of an Ed25519 key: always this long."""


def spki_of(key: Ed25519PublicKey) -> bytes:
    """DER SubjectPublicKeyInfo, 44 bytes."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def public_key_of(spki: bytes) -> Ed25519PublicKey:
    """The key of a DER SubjectPublicKeyInfo from outside; `PeerError` unless Ed25519 and canonical."""
    if len(spki) != SPKI_BYTES:
        raise PeerError("a public key is not an Ed25519 key")
    try:
        key = load_der_public_key(spki)
    except (ValueError, UnsupportedAlgorithm):
        raise PeerError("a public key does not parse") from None
    if not isinstance(key, Ed25519PublicKey) or spki_of(key) != spki:
        raise PeerError("a public key is not a canonical Ed25519 key")
    return key


def private_key_pem(key: Ed25519PrivateKey) -> bytes:
    """PKCS 8, not encrypted: the file's mode protects it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def private_key_of(pem: bytes) -> Ed25519PrivateKey:
    """Read back what `private_key_pem` wrote; `ValueError` for anything else."""
    try:
        key = load_pem_private_key(pem, password=None)
    except (TypeError, UnsupportedAlgorithm) as problem:
        raise ValueError(str(problem)) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("not an Ed25519 key")  # noqa: TRY004 - the file is wrong, not a caller's type
    return key
