from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from meshnode.errors import PeerError
from meshnode.identity.certificates import make_issuer
from meshnode.identity.domains import Domain, sign
from meshnode.identity.ids import MeshId, NodeId, node_id_of
from meshnode.identity.keys import spki_of
from meshnode.identity.revocation import LIST_BYTES, LISTED, RevocationList, read_list, sign_list
from tests.identity.mesh import TestMesh
from tests.identity.mutate import mutations

NOW = datetime(2026, 5, 1, tzinfo=UTC)
MESH = TestMesh(NOW)
NODE = MESH.node()
ROOT = NODE.root
ISSUER = (MESH.issuer.certificate.public_bytes(Encoding.DER),)
A, B = node_id_of(b"a"), node_id_of(b"b")


def id_of(key: Ed25519PrivateKey) -> NodeId:
    return node_id_of(spki_of(key.public_key()))


def test_an_issuers_list_is_read_by_others_as_it_was_signed() -> None:
    raw, signature = sign_list(MESH.issuer.key, NODE.mesh_id, 3, (B, A, A))
    told = read_list(ISSUER, raw, signature, ROOT)
    assert told == RevocationList(NODE.mesh_id, id_of(MESH.issuer.key), 3, tuple(sorted((A, B))))


def test_the_root_signs_a_list_of_its_own() -> None:
    raw, signature = sign_list(MESH.root.key, NODE.mesh_id, 1, (A,))
    assert read_list((), raw, signature, ROOT).issuer == NODE.mesh_id
    with pytest.raises(PeerError):
        read_list(ISSUER, raw, signature, ROOT)


def test_a_list_stays_valid_when_its_issuers_certificate_ended() -> None:
    old = make_issuer(MESH.root, MESH.issuer.key.public_key(), datetime(2001, 1, 1, tzinfo=UTC))
    raw, signature = sign_list(MESH.issuer.key, NODE.mesh_id, 1, (A,))
    assert read_list((old.public_bytes(Encoding.DER),), raw, signature, ROOT).nodes == (A,)


def test_a_member_is_no_issuer_whatever_it_signs() -> None:
    raw, signature = sign_list(NODE.key, NODE.mesh_id, 1, (A,))
    for chain in ((), ISSUER, (NODE.chain[0].public_bytes(Encoding.DER),)):
        with pytest.raises(PeerError):
            read_list(chain, raw, signature, ROOT)


def test_a_list_that_is_longer_than_its_keys_can_be_is_refused() -> None:
    """All lists are kept in one file."""
    raw, _ = sign_list(MESH.issuer.key, NODE.mesh_id, 1, [node_id_of(b"%d" % number) for number in range(LISTED)])
    assert len(raw) < LIST_BYTES
    told = {**msgspec.msgpack.decode(raw), "later": "x" * LIST_BYTES}
    longer = msgspec.msgpack.encode(told)
    with pytest.raises(PeerError, match="at most"):
        read_list(ISSUER, longer, sign(MESH.issuer.key, Domain.REVOCATION, NODE.mesh_id, longer), ROOT)


def test_a_list_of_another_mesh_or_with_impossible_values_is_refused() -> None:
    own = id_of(MESH.issuer.key)
    for body in (
        RevocationList(MeshId(node_id_of(b"other")), own, 1, (A,)),
        RevocationList(NODE.mesh_id, A, 1, (A,)),
        RevocationList(NODE.mesh_id, own, 0, (A,)),
        RevocationList(NODE.mesh_id, own, 1, (NodeId("x"),)),
        RevocationList(NODE.mesh_id, own, 1, (A,) * (LISTED + 1)),
    ):
        raw = msgspec.msgpack.encode(body)
        with pytest.raises(PeerError):
            read_list(ISSUER, raw, sign(MESH.issuer.key, Domain.REVOCATION, NODE.mesh_id, raw), ROOT)


def test_a_damaged_list_is_refused_whole() -> None:
    raw, signature = sign_list(MESH.issuer.key, NODE.mesh_id, 3, (A, B))
    for damaged in mutations([raw], rounds=300):
        if damaged != raw:
            with pytest.raises(PeerError):
                read_list(ISSUER, damaged, signature, ROOT)
            with pytest.raises(PeerError):
                read_list((damaged,), raw, signature, ROOT)
