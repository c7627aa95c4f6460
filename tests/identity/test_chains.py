"""Our verdict about certificates; OpenSSL's about the same corpus stands in tests/io/transport/test_tls.py."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from meshnode.errors import PeerError
from meshnode.identity.certificates import Role, make_issuer, make_stage, stage_name
from meshnode.identity.chains import (
    CERTIFICATE_BYTES,
    check_renewable,
    check_stage_leaf,
    parse_certificate,
    peer_identity,
    verify_chain,
)
from tests.identity.corpus import DAY, RUN, Case, corpus
from tests.identity.mesh import TestMesh
from tests.identity.mutate import mutations

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def test_a_member_is_who_its_key_says() -> None:
    mesh = TestMesh(NOW)
    node = mesh.node()
    peer = peer_identity(parse_certificate(der(node.chain[0])))
    assert peer.node_id == node.node_id
    assert peer.role is Role.MEMBER
    assert peer.expires == NOW + timedelta(days=7)
    assert peer_identity(mesh.node(Role.CLIENT).chain[0]).role is Role.CLIENT


@pytest.mark.parametrize("case", corpus(), ids=lambda case: case.title)
def test_only_members_of_the_corpus_are_taken_for_members(case: Case) -> None:
    root = case.mesh.root.certificate
    try:
        verify_chain([parse_certificate(der(each)) for each in case.chain], root, datetime.now(UTC))
        peer_identity(case.chain[0])
        taken = True
    except PeerError:
        taken = False
    assert taken == case.member_ok


def test_a_chain_is_valid_from_a_day_before_until_its_end() -> None:
    mesh = TestMesh(NOW)
    node = mesh.node()
    for moment in (NOW - DAY, NOW, NOW + 7 * DAY):
        verify_chain(node.chain, node.root, moment)
    outside = {"not valid yet": NOW - DAY - timedelta(seconds=1), "expired": NOW + 7 * DAY + timedelta(seconds=1)}
    for reason, moment in outside.items():
        with pytest.raises(PeerError, match=reason):
            verify_chain(node.chain, node.root, moment)


@pytest.mark.parametrize("length", [0, 4])
def test_chains_of_other_lengths_are_refused(length: int) -> None:
    node = TestMesh(NOW).node()
    with pytest.raises(PeerError, match="chain of"):
        verify_chain((node.chain * 2)[:length], node.root, NOW)


def test_a_stage_is_taken_for_no_other_stage_run_or_node() -> None:
    mesh = TestMesh(NOW)
    node, other = mesh.node(), mesh.node()
    leaf = make_stage(node.authority, node.key.public_key(), stage_name(1, RUN, node.node_id), NOW)
    check_stage_leaf(leaf, stage_name(1, RUN, node.node_id))
    for name in (
        stage_name(0, RUN, node.node_id),
        stage_name(1, RUN[::-1], node.node_id),
        stage_name(1, RUN, other.node_id),
    ):
        with pytest.raises(PeerError, match="planned neighbour"):
            check_stage_leaf(leaf, name)
    with pytest.raises(PeerError):
        peer_identity(leaf)
    with pytest.raises(PeerError):
        check_stage_leaf(node.chain[0], stage_name(1, RUN, node.node_id))


def test_a_certificate_is_renewable_for_half_a_year_by_its_own_issuer() -> None:
    mesh = TestMesh(NOW)
    (leaf, issuer), root = mesh.node(Role.CLIENT).chain, mesh.root.certificate
    assert check_renewable(leaf, issuer, root, NOW + 7 * DAY + 180 * DAY) is Role.CLIENT
    with pytest.raises(PeerError, match="too long ago"):
        check_renewable(leaf, issuer, root, NOW + 188 * DAY)
    other = TestMesh(NOW)
    with pytest.raises(PeerError, match="another signer"):
        check_renewable(leaf, make_issuer(mesh.root, other.issuer.key.public_key(), NOW), root, NOW)
    with pytest.raises(PeerError, match="another signer"):
        check_renewable(other.node().chain[0], other.issuer.certificate, root, NOW)


def test_a_certificate_longer_than_any_of_ours_is_not_parsed() -> None:
    with pytest.raises(PeerError, match="longer"):
        parse_certificate(bytes(CERTIFICATE_BYTES + 1))


def test_a_certificate_has_one_encoding() -> None:
    """Found by the damage below, once in ten runs: bits of the signature that are 0 may be said to be unused."""
    mesh = TestMesh(NOW)
    data = next(each for each in (der(mesh.node().chain[0]) for _ in range(200)) if not each[-1] & 1)
    assert data[-65] == 0
    with pytest.raises(PeerError, match="as DER wants it"):
        parse_certificate(data[:-65] + b"\1" + data[-64:])


def test_damaged_certificates_end_in_peer_errors() -> None:
    mesh = TestMesh(NOW)
    node = mesh.node()
    stage = make_stage(node.authority, node.key.public_key(), stage_name(1, RUN, node.node_id), NOW)
    upper = [*node.chain]
    samples = [der(each) for each in (*node.chain, node.root, stage, mesh.node(Role.CLIENT).chain[0])]
    passed = 0
    for data in mutations(samples):
        try:
            certificate = parse_certificate(data)
            verify_chain([certificate, *upper[1:]], node.root, NOW)
            peer_identity(certificate)
        except PeerError:
            continue
        passed += 1
        assert data in samples, "a damaged certificate was accepted"
    assert passed < 100
