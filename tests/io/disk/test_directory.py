"""The data directory on a real disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.errors import ConfigError
from meshnode.identity.certificates import Authority, Role, make_issuer, make_node
from meshnode.identity.credentials import Credentials
from meshnode.identity.ids import node_id_of
from meshnode.identity.invite_book import InviteBook, new_entry
from meshnode.identity.issuers import Appointment
from meshnode.identity.keys import private_key_pem, spki_of
from meshnode.io.disk.directory import DataDirectory
from tests.identity.mesh import TestMesh

NOW = datetime(2026, 5, 1, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def data(tmp_path: Path) -> Iterator[DataDirectory]:
    directory = DataDirectory.open(tmp_path / "data")
    yield directory
    directory.close()


def joined(data: DataDirectory, mesh: TestMesh) -> Credentials:
    """What `redeem` would return for this directory's key."""
    key = data.node_key()
    own = make_node(mesh.issuer, key.public_key(), Role.MEMBER, mesh.now)
    return Credentials(key, (own, mesh.issuer.certificate), mesh.root.certificate)


def test_a_made_mesh_is_found_again(tmp_path: Path) -> None:
    first = DataDirectory.open(tmp_path)
    assert first.membership(NOW) is None
    made = first.make_mesh(NOW)
    first.close()
    again = DataDirectory.open(tmp_path)
    found = again.membership(NOW)
    assert found is not None
    assert found.credentials.node_id == made.credentials.node_id
    assert found.credentials.mesh_id == made.credentials.mesh_id
    assert found.issuer is not None
    again.close()


def test_a_joined_mesh_is_found_again_without_the_right_to_admit(data: DataDirectory) -> None:
    mesh = TestMesh(NOW)
    data.join_mesh(joined(data, mesh))
    found = data.membership(NOW)
    assert found is not None
    assert found.credentials.role is Role.MEMBER
    assert found.issuer is None


def test_one_directory_belongs_to_one_mesh(data: DataDirectory) -> None:
    data.make_mesh(NOW)
    with pytest.raises(ConfigError, match="belongs to mesh"):
        data.make_mesh(NOW)
    with pytest.raises(ConfigError, match="belongs to mesh"):
        data.join_mesh(joined(data, TestMesh(NOW)))


def test_keys_left_by_a_mesh_that_was_not_finished_admit_nobody(data: DataDirectory) -> None:
    data.make_mesh(NOW)
    (data.path / "mesh.pem").unlink()  # as if the power went before the last write
    assert data.membership(NOW) is None
    data.join_mesh(joined(data, TestMesh(NOW)))
    found = data.membership(NOW)
    assert found is not None
    assert found.issuer is None


def test_an_issuer_renews_its_own_certificates_daily(data: DataDirectory) -> None:
    data.make_mesh(NOW)
    ends = []
    for moment in (NOW, NOW + DAY / 2, NOW + 2 * DAY, NOW + 30 * DAY, NOW + 360 * DAY, NOW + 700 * DAY):
        found = data.membership(moment)
        assert found is not None
        ends.append(found.credentials.chain[0].not_valid_after_utc - moment)
    assert ends == [7 * DAY, 6.5 * DAY, 7 * DAY, 7 * DAY, 7 * DAY, 7 * DAY]


def test_a_joiner_whose_certificate_ended_is_still_a_member_and_is_told_apart(data: DataDirectory) -> None:
    data.join_mesh(joined(data, TestMesh(NOW)))
    found = data.membership(NOW + 8 * DAY)
    assert found is not None
    assert found.credentials.expires < NOW + 8 * DAY


def test_renewed_certificates_replace_the_old_ones(data: DataDirectory) -> None:
    mesh = TestMesh(NOW)
    data.join_mesh(joined(data, mesh))
    mesh.now = NOW + 3 * DAY
    data.renew(joined(data, mesh))
    found = data.membership(NOW + 8 * DAY)
    assert found is not None
    assert found.credentials.expires == NOW + 10 * DAY


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_secrets_are_readable_by_their_owner_only(data: DataDirectory) -> None:
    data.make_mesh(NOW)
    data.api_token()
    for name in ("node.key", "root.key", "issuer.key", "invites.json", "api-token", "lock"):
        assert stat.S_IMODE((data.path / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE(data.path.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["mesh.pem", "node.key", "issuer.key", "issuer.pem", "invites.json", "incarnation"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 100, bytes(100_000)])
def test_a_damaged_file_is_told_and_never_a_traceback(data: DataDirectory, name: str, content: bytes) -> None:
    data.make_mesh(NOW)
    data.next_incarnation()
    (data.path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        data.membership(NOW), data.invites(), data.next_incarnation()
    assert str(data.path) in str(caught.value) or "invites" in str(caught.value)


def test_a_key_that_is_not_the_certificates_is_told(data: DataDirectory) -> None:
    data.make_mesh(NOW)
    (data.path / "node.key").unlink()
    with pytest.raises(ConfigError, match="do not belong together"):
        data.membership(NOW)


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file") as caught:
        DataDirectory.open(tmp_path / "file" / "below")
    assert "--data" in caught.value.hint


def test_a_second_node_is_refused(data: DataDirectory) -> None:
    with pytest.raises(ConfigError, match="another meshnode"):
        DataDirectory.open(data.path)


def test_leftovers_of_a_crash_are_removed(tmp_path: Path) -> None:
    (tmp_path / "mesh.pem.1234.part").write_bytes(b"half")
    DataDirectory.open(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_invites_survive_a_restart(data: DataDirectory) -> None:
    assert data.invites() == InviteBook()
    book = InviteBook().create(new_entry(b"invite-8", bytes(32), Role.CLIENT, 2, (NOW, NOW + DAY)))
    data.store_invites(book)
    assert data.invites() == book


def test_every_start_counts_one_incarnation(data: DataDirectory) -> None:
    assert [data.next_incarnation() for _ in range(3)] == [1, 2, 3]


def test_the_token_is_made_once(data: DataDirectory) -> None:
    token = data.api_token()
    assert len(token) == 64
    assert data.api_token() == token


def test_a_ledger_is_kept_as_it_is(data: DataDirectory) -> None:
    assert data.ledger() is None
    data.store_ledger(b"\x00claims\xff")
    assert data.ledger() == b"\x00claims\xff"


def test_known_peers_are_a_shortcut_and_damage_to_them_is_nothing(data: DataDirectory) -> None:
    assert data.peers() == {}
    node = TestMesh(NOW).node().node_id
    data.store_peers({node: ("10.0.0.1:8420", "[fd00::1]:8420")})
    assert data.peers() == {node: ("10.0.0.1:8420", "[fd00::1]:8420")}
    for damage in (b"", b"[]", b'{"a": ["b"]}', b"\xff", bytes(2_000_000)):
        (data.path / "peers.json").write_bytes(damage)
        assert data.peers() == {}


def test_another_nodes_credentials_are_our_own_bug(data: DataDirectory) -> None:
    credentials = replace(joined(data, TestMesh(NOW)), key=Ed25519PrivateKey.generate())
    with pytest.raises(AssertionError):
        data.join_mesh(credentials)


def appoint(data: DataDirectory, mesh: TestMesh) -> Authority:
    """An issuer's certificate of `mesh` for the key that this directory would issue with."""
    key = data.issuer_key()
    return Authority(make_issuer(mesh.root, key.public_key(), mesh.now), key)


def test_an_appointed_issuer_certifies_itself_and_is_one_after_a_restart(data: DataDirectory) -> None:
    mesh = TestMesh(NOW)
    assert data.join_mesh(joined(data, mesh)).issuer is None
    issuer = appoint(data, mesh)
    held = data.install_issuer(issuer, NOW)
    assert held.issuer is not None
    assert held.credentials.chain[1] == issuer.certificate
    again = data.membership(NOW)
    assert again is not None
    assert again.credentials.chain == held.credentials.chain
    assert stat.S_IMODE((data.path / "issuer.key").stat().st_mode) == 0o600
    assert spki_of(data.issuer_key().public_key()) == spki_of(issuer.key.public_key()), "the same key every year"
    assert data.invites() == InviteBook()
    assert data.root() is None


@pytest.mark.parametrize("left", ["issuer.key", "issuer.pem"])
def test_an_appointment_that_a_crash_cut_off_is_whole_or_not_there(data: DataDirectory, left: str) -> None:
    mesh = TestMesh(NOW)
    before = data.join_mesh(joined(data, mesh))
    issuer = appoint(data, mesh)
    pem = (data.path / "mesh.pem").read_bytes()
    data.install_issuer(issuer, NOW)
    (data.path / "mesh.pem").write_bytes(pem)  # the last of three files
    if left == "issuer.key":
        (data.path / "issuer.pem").unlink()  # and the second
        held = data.membership(NOW)
        assert held is not None
        assert (held.issuer, held.credentials.chain) == (None, before.credentials.chain)
    else:
        held = data.membership(NOW)
        assert held is not None
        assert held.credentials.chain[1] == issuer.certificate, "who joins here must find leaf and issuer to match"


def test_the_root_signs_only_for_its_own_mesh(data: DataDirectory) -> None:
    made = data.make_mesh(NOW)
    root = data.root()
    assert root is not None
    assert root.certificate == made.credentials.root
    assert data.has_root()
    (data.path / "root.key").write_bytes(private_key_pem(Ed25519PrivateKey.generate()))
    with pytest.raises(ConfigError, match="not the key of this mesh"):
        data.root()


def test_whom_the_root_appointed_is_kept_and_damage_is_told(data: DataDirectory) -> None:
    assert data.appointments() == ()
    known = (Appointment(node_id_of(b"a"), "attic", node_id_of(b"b"), NOW),)
    data.store_appointments(known)
    assert data.appointments() == known
    (data.path / "issuers.json").write_bytes(b"[{")
    with pytest.raises(ConfigError, match=r"issuers\.json"):
        data.appointments()
