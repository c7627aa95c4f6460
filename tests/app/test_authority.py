from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from meshnode.app.authority import NodeAuthority
from meshnode.core.membership.announcement import Body, announce, read
from meshnode.core.membership.roster import Roster
from meshnode.errors import PeerError
from meshnode.identity.certificates import Role, make_stage, stage_name
from meshnode.identity.credentials import Credentials
from meshnode.identity.domains import Domain
from meshnode.wire.messages import Announce
from tests.identity.mesh import TestMesh
from tests.identity.mutate import mutations


@pytest.fixture
def mesh() -> TestMesh:
    return TestMesh()


def authority(mesh: TestMesh, credentials: Credentials | None = None) -> NodeAuthority:
    own = credentials or mesh.node()
    return NodeAuthority(lambda: own, lambda: mesh.now)


def said_by(author: NodeAuthority) -> Body:
    return Body(author.mesh, author.node, 1, 1, "kitchen", ("10.0.0.1:1",), 5)


def test_what_one_node_announces_another_reads_by_certificates_alone(mesh: TestMesh) -> None:
    here, there = authority(mesh), authority(mesh)
    roster = Roster(here)
    assert roster.introduce(there.chain) == there.node
    assert roster.offer(announce(said_by(there), there), now=0.0)
    assert roster.body(there.node) == said_by(there)


def test_a_role_is_what_the_issuer_wrote(mesh: TestMesh) -> None:
    client = authority(mesh, mesh.node(Role.CLIENT))
    assert authority(mesh).admit(client.chain).role == "client"


def test_strangers_and_minted_members_are_not_admitted(mesh: TestMesh) -> None:
    here, member = authority(mesh), mesh.node()
    stage_key = Ed25519PrivateKey.generate()
    stage = make_stage(member.authority, stage_key.public_key(), stage_name(0, "00" * 8, member.node_id), mesh.now)
    chains = {
        "another mesh": authority(TestMesh()).chain,
        "nothing": (),
        "no certificate": (b"\x30",),
        "the leaf alone": authority(mesh).chain[:1],
        "the wrong way round": authority(mesh).chain[::-1],
        "an issuer as a node": authority(mesh).chain[1:],
        "a stage as a node": tuple(c.public_bytes(Encoding.DER) for c in (stage, *member.chain)),
    }
    for name, chain in chains.items():
        with pytest.raises(PeerError):
            print(name, here.admit(chain))


def test_validity_is_judged_by_the_time_that_is_handed_in(mesh: TestMesh) -> None:
    here, there = mesh.node(), authority(mesh)
    late = NodeAuthority(lambda: here, lambda: mesh.now + timedelta(days=30))
    with pytest.raises(PeerError, match="expired"):
        late.admit(there.chain)


def test_a_signature_holds_in_its_domain_mesh_and_bytes_only(mesh: TestMesh) -> None:
    here, there = authority(mesh), authority(mesh)
    author = here.admit(there.chain)
    signature = there.sign(Domain.ANNOUNCEMENT, b"data")
    assert author.signed(Domain.ANNOUNCEMENT, b"data", signature)
    assert not author.signed(Domain.RENEWAL, b"data", signature)
    assert not author.signed(Domain.ANNOUNCEMENT, b"date", signature)
    assert not author.signed(Domain.ANNOUNCEMENT, b"data", here.sign(Domain.ANNOUNCEMENT, b"data"))
    assert not author.signed(Domain.ANNOUNCEMENT, b"data", b"")
    assert not replace(author, mesh=TestMesh().node().mesh_id).signed(Domain.ANNOUNCEMENT, b"data", signature)


def test_no_damaged_signature_or_record_is_accepted(mesh: TestMesh) -> None:
    here, there = authority(mesh), authority(mesh)
    author, record = here.admit(there.chain), announce(said_by(there), there)
    for body in mutations([record.body], rounds=2_000):
        if body != record.body:
            with pytest.raises(PeerError, match="signature"):
                read(Announce(record.author, body, record.signature), author, here.mesh)
    for signature in mutations([record.signature], rounds=500):
        assert signature == record.signature or not author.signed(Domain.ANNOUNCEMENT, record.body, signature)


def test_damaged_chains_are_the_peers_error(mesh: TestMesh) -> None:
    here, chain = authority(mesh), authority(mesh).chain
    for leaf in mutations(chain[:1], rounds=500):
        if leaf != chain[0]:
            with pytest.raises(PeerError):
                here.admit((leaf, *chain[1:]))


def test_renewed_certificates_are_shown_from_then_on(mesh: TestMesh) -> None:
    held = [mesh.node()]
    own = NodeAuthority(lambda: held[-1], lambda: mesh.now)
    before = own.chain
    held.append(mesh.node())
    assert own.chain != before
