from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from meshnode.identity.certificates import Role, head_name, make_stage, node_name, stage_name
from meshnode.identity.ids import NodeId
from tests.identity.corpus import RUN
from tests.identity.mesh import TestMesh

NOW = datetime(2026, 5, 1, tzinfo=UTC)
MESH = TestMesh(NOW)
NODE = MESH.node()


def test_names_are_valid_dns_names_even_when_longest() -> None:
    for name in (stage_name(63, RUN, NODE.node_id), head_name(RUN, NODE.node_id), node_name(NODE.node_id)):
        assert len(name) <= 253
        assert all(1 <= len(label) <= 63 for label in name.split("."))


@pytest.mark.parametrize("run", ["", "abc", RUN.upper(), RUN + "0", "0123456789abcde."])
def test_a_run_in_a_name_is_sixteen_hex_digits(run: str) -> None:
    with pytest.raises(AssertionError):
        stage_name(0, run, NODE.node_id)


def test_a_name_needs_a_whole_node_id() -> None:
    with pytest.raises(AssertionError):
        head_name(RUN, NodeId("b.evil"))


def test_a_member_may_name_only_below_itself() -> None:
    leaf = NODE.chain[0]
    constraint = leaf.extensions.get_extension_for_class(x509.NameConstraints)
    assert constraint.critical
    assert constraint.value.permitted_subtrees == [x509.DNSName(node_name(NODE.node_id))]
    basic = leaf.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)


def test_a_client_may_sign_nothing() -> None:
    leaf = MESH.node(Role.CLIENT).chain[0]
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert leaf.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)[0].value == "client"


def test_validity_is_backdated_by_a_day_and_ends_as_designed() -> None:
    stage = make_stage(NODE.authority, Ed25519PrivateKey.generate().public_key(), head_name(RUN, NODE.node_id), NOW)
    lives = [(stage, 1), (NODE.chain[0], 7), (NODE.chain[1], 365), (NODE.root, 20 * 365)]
    for certificate, days in lives:
        assert certificate.not_valid_before_utc == NOW - timedelta(hours=24)
        assert certificate.not_valid_after_utc == NOW + timedelta(days=days)


def test_credentials_know_node_mesh_and_role_and_hide_the_key() -> None:
    assert NODE.mesh_id == MESH.node().mesh_id
    assert NODE.role is Role.MEMBER
    assert NODE.expires == NOW + timedelta(days=7)
    assert "key" not in repr(NODE).replace("public_key", "")
    assert NODE.chain_pem.count(b"BEGIN CERTIFICATE") == 2
    assert NODE.root_pem.count(b"BEGIN CERTIFICATE") == 1
