"""Issuers from the command to the disk: two real data directories, real TLS, real mediators."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio

from meshnode.app.authority import NodeAuthority
from meshnode.app.issuing import Issuing
from meshnode.app.revoking import Revoking
from meshnode.core.node import events as on
from meshnode.core.node.mediator import Mediator, Self
from meshnode.errors import ConfigError, PeerError
from meshnode.identity.certificates import Authority, Role, make_issuer, make_node
from meshnode.identity.chains import key_bytes
from meshnode.identity.credentials import Credentials
from meshnode.identity.ids import NodeId, node_id_of
from meshnode.io.disk.directory import DataDirectory, Membership
from meshnode.wire.messages import Introduce
from meshnode.wire.preface import StreamClass
from tests.app.members import Member

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


class Machine:
    """A node without links: `serve` is what its mesh port answers, `know` and `link` what its mediator hears."""

    def __init__(self, data: DataDirectory, held: Membership, name: str) -> None:
        self.data, self.held = data, held
        self.member = Member(held.credentials)
        authority = NodeAuthority(lambda: self.held.credentials, lambda: datetime.now(UTC))
        role = held.credentials.role.value
        self.mediator = Mediator(Self(name, role, (), 10**9, 1), authority, os.urandom, 0.0)
        self._changed = trio.Event()
        self.clock = 0.0
        revoking = Revoking(self.mediator, self._post, self._wait, lambda: self.held.issuer)
        self.issuing = Issuing(data, self.mediator, self.member.transport, revoking, lambda: self.held, self._use)
        self.revoking = revoking

    async def _post(self, event: on.Event) -> None:
        self.mediator.handle(event, 1.0)
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def _wait(self) -> None:
        await self._changed.wait()

    def _use(self, held: Membership) -> None:
        self.held = held
        self.member.transport.renew(held.credentials)

    @property
    def node(self) -> NodeId:
        return self.mediator.node

    def meet(self, other: Machine) -> None:
        """They are linked, and this one knows the other's certificate and announcement."""
        self.mediator.handle(on.PeerFound(other.node, other.member.addresses), 1.0)
        self.mediator.handle(on.LinkOpened(other.node), 1.0)
        self.mediator.handle(on.Received(other.node, Introduce(other.mediator.authority.chain)), 1.0)
        self.clock += 100.0
        other.mediator.handle(on.AddressesChanged(other.member.addresses), self.clock)
        other.mediator.handle(on.CertificateRenewed(), self.clock)
        other.mediator.handle(on.TimePassed(), self.clock + 9.0)
        record = other.mediator.membership.voice.record
        assert record is not None
        self.mediator.handle(on.Received(other.node, record), 1.0)
        self.mediator.handle(on.Received(other.node, Introduce(other.mediator.authority.chain)), 1.0)


class Mesh:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: list[DataDirectory] = []
        data = self.open("root")
        data.make_mesh(NOW - 30 * DAY)
        held = data.membership(NOW)
        assert held is not None
        self.founder = Machine(data, held, "one")

    def open(self, name: str) -> DataDirectory:
        self.opened.append(DataDirectory.open(self.folder / name))
        return self.opened[-1]

    def joined(self, name: str, issuer: Machine, role: Role = Role.MEMBER) -> Machine:
        data, signer = self.open(name), issuer.held.issuer
        assert signer is not None
        key = data.node_key()
        own = make_node(signer, key.public_key(), role, NOW)
        credentials = Credentials(key, (own, signer.certificate), issuer.held.credentials.root)
        return Machine(data, data.join_mesh(credentials), name)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    made = Mesh(tmp_path)
    yield made
    for data in made.opened:
        data.close()


def issuer_of(machine: Machine) -> NodeId:
    assert machine.held.issuer is not None
    return node_id_of(key_bytes(machine.held.issuer.certificate))


async def made_issuer(mesh: Mesh, nursery: trio.Nursery, name: str = "two") -> Machine:
    second = mesh.joined(name, mesh.founder)
    await second.member.listen(nursery, second.issuing.serve)
    mesh.founder.meet(second)
    await mesh.founder.issuing.add(second.node)
    return second


async def test_an_appointed_node_issues_and_both_directories_remember_it(mesh: Mesh, nursery: trio.Nursery) -> None:
    second = await made_issuer(mesh, nursery)
    issuer = issuer_of(second)
    assert issuer not in (second.node, issuer_of(mesh.founder))
    assert node_id_of(key_bytes(second.held.credentials.chain[1])) == issuer, "who joins there checks that they match"
    listed = {each.name: each for each in mesh.founder.issuing.listings()}
    assert (listed["two"].node, listed["two"].issuer, listed["two"].state) == (second.node, issuer, "active")
    assert listed["one"].issuer == issuer_of(mesh.founder)
    found = second.data.membership(datetime.now(UTC))
    assert found is not None
    assert found.issuer is not None
    assert found.credentials.chain == second.held.credentials.chain
    assert [each.issuer for each in mesh.founder.data.appointments()] == [issuer]
    third = mesh.joined("three", second)
    mesh.founder.meet(third)
    assert next(each for each in mesh.founder.issuing.listings() if each.issuer == issuer).members == 1


async def test_a_second_appointment_keeps_the_key_and_begins_a_new_year(mesh: Mesh, nursery: trio.Nursery) -> None:
    second = await made_issuer(mesh, nursery)
    before = second.held.issuer
    again = await mesh.founder.issuing.add(second.node)
    assert second.held.issuer != before
    assert again.issuer == issuer_of(second)
    assert len(mesh.founder.data.appointments()) == 1


async def test_who_cannot_be_made_an_issuer_is_refused_with_the_reason(mesh: Mesh, nursery: trio.Nursery) -> None:
    founder = mesh.founder
    member, client = mesh.joined("two", founder), mesh.joined("three", founder, Role.CLIENT)
    with pytest.raises(ConfigError, match="root key of this mesh is not on this machine"):
        await member.issuing.add(founder.node)
    with pytest.raises(ConfigError, match="is not reachable now"):
        await founder.issuing.add(member.node)
    founder.meet(client)
    with pytest.raises(ConfigError, match="is a client"):
        await founder.issuing.add(client.node)
    with pytest.raises(ConfigError, match="holds the root key"):
        await founder.issuing.add(founder.node)
    with pytest.raises(ConfigError, match="no node id"):
        await founder.issuing.add(NodeId("two"))
    await founder.revoking.revoke(member.node)
    with pytest.raises(ConfigError, match="was revoked from this mesh"):
        await founder.issuing.add(member.node)
    assert founder.data.appointments() == ()


async def test_a_client_is_not_made_an_issuer_whoever_says_so(mesh: Mesh, nursery: trio.Nursery) -> None:
    client = mesh.joined("three", mesh.founder, Role.CLIENT)
    await client.member.listen(nursery, client.issuing.serve)
    stream = await mesh.founder.member.dial(client.member, StreamClass.ISSUER)
    await client.member.ended.wait()
    assert isinstance(client.member.raised[0], PeerError)
    await stream.aclose()


async def test_the_root_revokes_an_issuer_and_a_node_with_its_issuer(mesh: Mesh, nursery: trio.Nursery) -> None:
    second = await made_issuer(mesh, nursery)
    third = await made_issuer(mesh, nursery, "three")
    joiner = mesh.joined("four", second)
    founder = mesh.founder
    for each in (second, third, joiner):
        founder.meet(each)
    await founder.issuing.revoke(issuer_of(second))
    assert set(founder.mediator.roster.authors) == {third.node}
    assert [founder.revoking.barred(each.node) for each in (second, joiner, third)] == [True, True, False]
    await founder.issuing.revoke_issuers_on(third.node)
    states = {each.name: each.state for each in founder.issuing.listings()}
    assert states == {"one": "active", "two": "revoked", "three": "revoked"}
    root = founder.mediator.membership.revocations.of(NodeId(founder.mediator.authority.mesh))
    assert root is not None
    assert root.version == 2


async def test_every_member_can_tell_whose_issuer_it_is_and_another_issuer_does_not_revoke_half_of_it(
    mesh: Mesh, nursery: trio.Nursery
) -> None:
    second, third = await made_issuer(mesh, nursery), await made_issuer(mesh, nursery, "three")
    second.meet(third)
    listed = {each.issuer: each for each in second.issuing.listings()}
    assert (listed[issuer_of(third)].node, listed[issuer_of(third)].name) == (third.node, "three")
    assert listed[issuer_of(third)].expires_at is not None
    with pytest.raises(ConfigError, match="three is an issuer: it could let itself in again"):
        await second.issuing.revoke_issuers_on(third.node)
    await second.issuing.revoke_issuers_on(mesh.joined("four", second).node)


async def test_an_issuer_is_not_revoked_without_the_root_nor_the_one_that_let_this_node_in(mesh: Mesh) -> None:
    founder, member = mesh.founder, mesh.joined("two", mesh.founder)
    with pytest.raises(ConfigError, match="would be out itself"):
        await founder.issuing.revoke(issuer_of(founder))
    with pytest.raises(ConfigError, match="no issuer's id"):
        await founder.issuing.revoke(NodeId("two"))
    with pytest.raises(ConfigError, match="root key"):
        await member.issuing.revoke(issuer_of(founder))


async def test_a_person_is_warned_of_one_issuer_of_the_root_key_and_of_an_end(
    mesh: Mesh, nursery: trio.Nursery
) -> None:
    founder = mesh.founder
    assert founder.issuing.warnings() == (), "alone there is nobody to see to"
    second = mesh.joined("two", founder)
    await second.member.listen(nursery, second.issuing.serve)
    founder.meet(second)
    assert "only issuer" in founder.issuing.warnings()[0]
    await founder.issuing.add(second.node)
    assert [text.split(" lies")[0] for text in founder.issuing.warnings()] == ["the root key of this mesh"]
    (founder.data.path / "root.key").unlink()
    assert founder.issuing.warnings() == ()
    assert second.issuing.warnings() == ()


async def test_an_issuer_near_its_end_says_so_and_one_beyond_it_lets_others_renew_it(
    mesh: Mesh, nursery: trio.Nursery
) -> None:
    second = await made_issuer(mesh, nursery)
    second.meet(mesh.founder)
    root = mesh.founder.data.root()
    assert root is not None
    assert second.held.issuer is not None
    key = second.held.issuer.key
    short_lived = make_issuer(root, key.public_key(), NOW - timedelta(days=350))
    second.held = second.data.install_issuer(Authority(short_lived, key), NOW)
    assert "right to invite ends on" in second.issuing.warnings()[0]
    ended = make_issuer(root, key.public_key(), NOW - timedelta(days=370))
    second.data.install_issuer(Authority(ended, key), NOW - 6 * DAY)
    held = second.data.membership(NOW)
    assert held is not None
    assert held.credentials.chain[0].not_valid_after_utc < NOW + 2 * DAY, "it does not certify itself any more"
