"""Revocation lists: who is no longer a member, by the word of an issuer, or of the root for issuers themselves.

One list per issuer, replaced as a whole by one of a higher version; the union of all counts. A list stays valid after
the certificate of its issuer ended: what it revokes could otherwise come back by waiting.

Invariant: a list is believed only from the root or from a key that the root made an issuer.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.errors import PeerError
from meshnode.identity.chains import check_issuer, key_bytes, mesh_id_of_root, parse_certificate
from meshnode.identity.domains import Domain, sign, verify
from meshnode.identity.ids import MeshId, NodeId, is_id, node_id_of
from meshnode.identity.keys import public_key_of, spki_of

LISTED = 512
"""Keys on one list, 27 KB: as many as a mesh remembers. An issuer may drop a key 187 days after its last certificate
was signed (7 days valid, 180 renewable)."""

LIST_BYTES = 30 * 1024
"""Of a signed list: 512 keys take 28 KB; the rest is for fields of later versions. All lists are kept in one file."""


class RevocationList(msgspec.Struct, frozen=True):
    """The signed content."""

    mesh: MeshId
    issuer: NodeId
    """Hash of the signing key; the mesh's own for the root."""
    version: int
    """Grows with every list of this issuer."""
    nodes: tuple[NodeId, ...]
    """Hashes of the revoked keys: of nodes, and on the root's list of issuers too."""


def sign_list(key: Ed25519PrivateKey, mesh: MeshId, version: int, nodes: Sequence[NodeId]) -> tuple[bytes, bytes]:
    """The list that follows version `version - 1`, as bytes, and its signature by the issuer's (or root's) `key`."""
    assert len(nodes) <= LISTED, "a revocation list outgrew its limit"
    assert version > 0, "versions begin at 1"
    issuer = node_id_of(spki_of(key.public_key()))
    raw = msgspec.msgpack.encode(RevocationList(mesh, issuer, version, tuple(sorted(set(nodes)))))
    return raw, sign(key, Domain.REVOCATION, mesh, raw)


def read_list(chain: Sequence[bytes], raw: bytes, signature: bytes, root: x509.Certificate) -> RevocationList:
    """The checked list of the issuer in `chain` (DER; empty for the root). Raises PeerError for any other."""
    signer = root
    if chain:
        signer = parse_certificate(chain[0])
        check_issuer(signer, root)
    if len(chain) > 1:
        raise PeerError("a revocation list with more than its issuer's certificate")
    spki, mesh = key_bytes(signer), mesh_id_of_root(root)
    if len(raw) > LIST_BYTES:
        raise PeerError(f"a revocation list of {len(raw)} bytes, at most {LIST_BYTES} are allowed")
    verify(public_key_of(spki), Domain.REVOCATION, mesh, raw, signature)
    try:
        told = msgspec.msgpack.decode(raw, type=RevocationList)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PeerError(f"a malformed revocation list: {error}") from None
    if told.mesh != mesh or told.issuer != node_id_of(spki):
        raise PeerError("a revocation list in another issuer's name")
    if told.version < 1 or len(told.nodes) > LISTED or not all(is_id(node) for node in told.nodes):
        raise PeerError("a revocation list with impossible values")
    return told
