"""Joining with an invite and renewing, over real sockets and real TLS."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.errors import ConfigError, InviteError, LinkLost, MeshError, PeerError
from meshnode.identity.certificates import Authority, Role, make_issuer
from meshnode.identity.credentials import Credentials
from meshnode.identity.ids import node_id_of
from meshnode.identity.invite_book import FAILURES_THAT_LOCK
from meshnode.identity.invites import Invite
from meshnode.identity.keys import spki_of
from meshnode.io.transport.join import Joined, renew
from meshnode.io.transport.join import redeem as redeem_for
from meshnode.io.transport.transport import Handlers, Transport
from meshnode.wire.preface import StreamClass
from tests.identity.mesh import TestMesh
from tests.io.transport.issuer import Issuer, echo

WEEK = timedelta(days=7)


@pytest.fixture
async def issuer(nursery: trio.Nursery) -> Issuer:
    return await Issuer().start(nursery)


def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


async def redeem(invite: Invite, mine: Ed25519PrivateKey, now: datetime) -> Credentials:
    return (await redeem_for(invite, mine, now)).credentials


async def dial(credentials: Credentials, issuer: Issuer) -> None:
    """Prove that `credentials` open a MEMBER stream."""
    stream = await Transport(credentials).dial(issuer.credentials.node_id, [issuer.address], StreamClass.CONTROL)
    await stream.send_frame(b"x")
    assert await stream.receive_frame() == b"x"
    await stream.aclose()


async def test_an_invite_makes_a_member_that_others_let_in(issuer: Issuer) -> None:
    joined = await redeem_for(await issuer.invite(), key(), issuer.now)
    assert joined == Joined(joined.credentials, issuer.credentials.node_id, issuer.address)
    assert joined.credentials.role is Role.MEMBER
    assert joined.credentials.mesh_id == issuer.credentials.mesh_id
    await dial(joined.credentials, issuer)


async def test_the_same_key_gets_the_same_certificate_and_another_none(issuer: Issuer) -> None:
    invite, mine = await issuer.invite(), key()
    first, again = [await redeem(invite, mine, issuer.now) for _ in range(2)]
    assert first.chain == again.chain
    with pytest.raises(InviteError, match="used by another machine"):
        await redeem(invite, key(), issuer.now)


async def test_two_racing_joiners_get_exactly_one_certificate(issuer: Issuer) -> None:
    invite = await issuer.invite()
    outcomes: list[Credentials | MeshError] = []

    async def join() -> None:
        try:
            outcomes.append(await redeem(invite, key(), issuer.now))
        except InviteError as refused:
            outcomes.append(refused)

    async with trio.open_nursery() as racing:
        for _ in range(4):
            racing.start_soon(join)
    winners = [outcome for outcome in outcomes if isinstance(outcome, Credentials)]
    assert len(winners) == 1
    assert len(outcomes) == 4
    assert len(issuer.desk.book.entries[0].admitted) == 1
    await dial(winners[0], issuer)


async def test_the_used_mark_is_durable_before_the_certificate_exists(issuer: Issuer) -> None:
    await redeem(await issuer.invite(), key(), issuer.now)
    created, marked, certified = (book.entries[0].admitted for book in issuer.kept)
    assert created == ()
    assert [admission.certificate for admission in marked] == [b""]
    assert [bool(admission.certificate) for admission in certified] == [True]


async def test_a_joiner_that_vanishes_after_the_mark_tries_again(issuer: Issuer) -> None:
    invite, mine = await issuer.invite(), key()
    await redeem(invite, mine, issuer.now)
    marked = issuer.kept[1]  # what a crash between mark and signature leaves on disk
    issuer.desk.book = marked
    joined = await redeem(invite, mine, issuer.now)
    await dial(joined, issuer)


async def test_an_expired_invite_is_refused_by_either_clock(issuer: Issuer) -> None:
    invite = await issuer.invite(life=timedelta(hours=1))
    issuer.now += timedelta(hours=2)
    with pytest.raises(InviteError, match="this invite expired at"):
        await redeem(invite, key(), issuer.now)
    with pytest.raises(InviteError, match="has expired"):
        await redeem(invite, key(), issuer.now - timedelta(hours=2))


@pytest.mark.parametrize("life", [timedelta(0), timedelta(days=31), timedelta(days=40_000), timedelta.max])
async def test_an_invite_for_ever_is_the_users_error(issuer: Issuer, life: timedelta) -> None:
    with pytest.raises(ConfigError, match="within 30 days"):
        await issuer.invite(life=life)


async def test_a_revoked_key_gets_no_certificate_by_invite_or_renewal(issuer: Issuer) -> None:
    mine, invite = key(), await issuer.invite(uses=2)
    member = await redeem(invite, mine, issuer.now)
    issuer.desk.barred = lambda node: node == member.node_id
    with pytest.raises(InviteError, match="key was revoked from the mesh"):
        await redeem(invite, mine, issuer.now)
    with pytest.raises(MeshError, match="key was revoked from the mesh"):
        await renew(member, [issuer.address], issuer.now)
    await redeem(invite, key(), issuer.now)


async def test_a_revoked_invite_is_refused(issuer: Issuer) -> None:
    invite = await issuer.invite()
    await issuer.desk.change(lambda book: book.revoke(invite.invite_id, issuer.now))
    with pytest.raises(InviteError, match="revoked"):
        await redeem(invite, key(), issuer.now)


async def test_wrong_secrets_lock_an_invite(issuer: Issuer) -> None:
    invite = await issuer.invite()
    guessed = replace(invite, secret=bytes(16))
    for _ in range(FAILURES_THAT_LOCK):
        with pytest.raises(InviteError, match="secret"):
            await redeem(guessed, key(), issuer.now)
    with pytest.raises(InviteError, match="locked"):
        await redeem(invite, key(), issuer.now)
    assert issuer.kept[-1].entries[0].failures == FAILURES_THAT_LOCK


async def test_an_invite_that_the_issuer_does_not_know_is_refused(issuer: Issuer) -> None:
    invite = replace(await issuer.invite(), invite_id=b"unknown!")
    with pytest.raises(InviteError, match="does not know"):
        await redeem(invite, key(), issuer.now)


@pytest.mark.parametrize("pin", ["mesh_pin", "issuer_pin"])
async def test_a_joiner_sends_nothing_to_whom_the_pins_do_not_name(issuer: Issuer, pin: str) -> None:
    invite = replace(await issuer.invite(), **{pin: bytes(16)})
    with pytest.raises(PeerError, match="another mesh or another node"):
        await redeem(invite, key(), issuer.now)
    assert issuer.desk.book.entries[0].failures == 0  # nothing reached the book


async def test_certificates_of_the_issuer_shown_by_somebody_else_are_refused(nursery: trio.Nursery) -> None:
    issuer, thief = Issuer(), Issuer()
    await thief.start(nursery)
    stolen = replace(thief.credentials, root=issuer.credentials.root)
    thief.desk.renew(stolen, issuer.mesh.issuer)  # shows their root and issuer, over its own TLS leaf
    invite = await issuer.invite(addresses=[thief.address])
    with pytest.raises(PeerError, match="names another signer"):
        await redeem(invite, key(), issuer.now)


async def test_dead_and_wrong_addresses_are_passed_over(issuer: Issuer, nursery: trio.Nursery) -> None:
    wrong = await Issuer().start(nursery)
    with trio.socket.socket() as closed:
        await closed.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{closed.getsockname()[1]}"
        invite = await issuer.invite(addresses=[dead, wrong.address, issuer.address])
        await dial(await redeem(invite, key(), issuer.now), issuer)


async def test_nobody_at_the_address_is_a_lost_link(issuer: Issuer) -> None:
    with trio.socket.socket() as closed:
        await closed.bind(("127.0.0.1", 0))
        invite = await issuer.invite(addresses=[f"127.0.0.1:{closed.getsockname()[1]}"])
        with pytest.raises(LinkLost, match="cannot be reached"):
            await redeem(invite, key(), issuer.now)


async def test_a_node_that_is_no_issuer_admits_nobody(issuer: Issuer, nursery: trio.Nursery) -> None:
    port = await nursery.start(Transport(issuer.mesh.node()).serve, "127.0.0.1", 0, Handlers(echo))
    invite: Invite = await issuer.invite(addresses=[f"127.0.0.1:{port}"])
    with pytest.raises(LinkLost):
        await redeem(invite, key(), issuer.now)


async def test_a_member_renews_before_and_after_its_end(issuer: Issuer) -> None:
    member = issuer.mesh.node(Role.CLIENT)
    fresh = await renew(member, [issuer.address], issuer.now)
    assert (fresh.node_id, fresh.role) == (member.node_id, Role.CLIENT)
    assert fresh.chain[0].serial_number != member.chain[0].serial_number
    ended = issuer.mesh.node(now=issuer.now - 2 * WEEK)
    fresh = await renew(ended, [issuer.address], issuer.now)
    assert fresh.expires == (issuer.now + WEEK).replace(microsecond=0)
    await dial(fresh, issuer)


async def test_a_renewal_finds_the_issuer_among_many_members(issuer: Issuer, nursery: trio.Nursery) -> None:
    port = await nursery.start(Transport(issuer.mesh.node()).serve, "127.0.0.1", 0, Handlers(echo))
    member = issuer.mesh.node()
    others = [f"127.0.0.1:{port}"] * 20
    fresh = await renew(member, [*others, issuer.address], issuer.now)
    assert fresh.node_id == member.node_id


def second_issuer(mesh: TestMesh) -> TestMesh:
    """The same mesh with an issuer that the same root made."""
    other = TestMesh(mesh.now)
    other.root = mesh.root
    other.issuer = Authority(make_issuer(mesh.root, other.issuer.key.public_key(), mesh.now), other.issuer.key)
    return other


async def test_any_issuer_renews_what_another_one_signed(issuer: Issuer) -> None:
    other = second_issuer(issuer.mesh)
    member = other.node(Role.CLIENT, now=issuer.now - WEEK * 2)
    fresh = await renew(member, [issuer.address], issuer.now)
    assert (fresh.node_id, fresh.role) == (member.node_id, Role.CLIENT)
    assert fresh.chain[1] == issuer.mesh.issuer.certificate
    await dial(fresh, issuer)


async def test_what_a_revoked_issuer_signed_is_not_renewed_by_another(issuer: Issuer) -> None:
    other = second_issuer(issuer.mesh)
    out = node_id_of(spki_of(other.issuer.key.public_key()))
    issuer.desk.revoked = lambda who: who == out
    with pytest.raises(InviteError, match="revoked from the mesh"):
        await renew(other.node(), [issuer.address], issuer.now)
    await renew(issuer.mesh.node(), [issuer.address], issuer.now)


async def test_a_revoked_issuer_lets_nobody_in_and_is_asked_for_nothing(issuer: Issuer) -> None:
    invite, member = await issuer.invite(), issuer.mesh.node()
    with pytest.raises(PeerError, match="the issuer there was revoked"):
        await renew(member, [issuer.address], issuer.now, lambda who: who == issuer.desk.issuer)
    issuer.desk.revoked = lambda who: who == issuer.desk.issuer
    with pytest.raises(PeerError, match="admits nobody"):
        await redeem(invite, key(), issuer.now)
    with pytest.raises(ConfigError, match="root of this mesh revoked the issuer"):
        await issuer.invite()


async def test_an_issuer_whose_year_is_over_says_how_to_go_on(issuer: Issuer) -> None:
    issuer.now += timedelta(days=366)
    with pytest.raises(ConfigError, match="as an issuer ended on") as told:
        await issuer.invite()
    assert "meshnode issuer add" in told.value.hint


async def test_what_is_not_renewable_is_refused(issuer: Issuer) -> None:
    ancient = issuer.mesh.node(now=issuer.now - timedelta(days=200))
    with pytest.raises(InviteError, match="not one that the issuer renews"):
        await renew(ancient, [issuer.address], issuer.now)
    foreign = replace(TestMesh().node(), root=issuer.credentials.root)
    with pytest.raises(InviteError, match="not one that the issuer renews"):
        await renew(foreign, [issuer.address], issuer.now)
    with pytest.raises(PeerError, match="another mesh"):
        await renew(TestMesh().node(), [issuer.address], issuer.now)
    borrowed = replace(issuer.mesh.node(), key=key())  # somebody else's certificate
    with pytest.raises((PeerError, LinkLost)):
        await renew(borrowed, [issuer.address], issuer.now)
