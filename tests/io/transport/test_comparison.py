"""Joining by number, over real sockets and real TLS; two people are played by the test."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.errors import ConfigError, InviteError, MeshError, PeerError
from meshnode.identity.certificates import Role
from meshnode.identity.ids import node_id_of
from meshnode.identity.keys import spki_of
from meshnode.io.transport.comparison import join_by_number
from meshnode.io.transport.comparison_desk import ComparisonDesk, PendingJoin
from meshnode.io.transport.join import Joined
from meshnode.io.transport.transport import Transport
from meshnode.wire import limits
from meshnode.wire.preface import StreamClass
from tests.io.transport.issuer import Issuer


@pytest.fixture
async def issuer(nursery: trio.Nursery) -> Issuer:
    found = await Issuer().start(nursery)
    found.desk.comparisons = ComparisonDesk()
    return found


def comparisons(issuer: Issuer) -> ComparisonDesk:
    assert issuer.desk.comparisons is not None
    return issuer.desk.comparisons


def pending(issuer: Issuer) -> PendingJoin:
    found = comparisons(issuer).pending
    assert found is not None
    return found


async def ask(issuer: Issuer, same: Callable[[str], Awaitable[bool]], mesh: str = "", name: str = "kitchen") -> Joined:
    now: datetime = issuer.now
    return await join_by_number([issuer.address], mesh, name, Ed25519PrivateKey.generate(), now, same)


def saying(answer: bool, *, before: Callable[[str], object] = lambda number: None) -> Callable[[str], Awaitable[bool]]:
    async def same(number: str) -> bool:
        await trio.testing.wait_all_tasks_blocked()  # the issuer has shown its number
        before(number)
        return answer

    return same


async def test_two_people_who_see_one_number_make_a_member(issuer: Issuer) -> None:
    def approve(number: str) -> None:
        waiting = pending(issuer)
        assert (waiting.name, waiting.address, waiting.number) == ("kitchen", "127.0.0.1", number)
        comparisons(issuer).approve(f"{number[:3]} {number[3:]}")

    joined = await ask(issuer, saying(True, before=approve), issuer.credentials.mesh_id[:16])
    assert joined.credentials.role is Role.MEMBER
    assert joined.issuer_node == issuer.credentials.node_id
    assert comparisons(issuer).pending is None
    stream = await Transport(joined.credentials).dial(joined.issuer_node, [issuer.address], StreamClass.CONTROL)
    await stream.aclose()


async def test_a_no_at_the_joiner_installs_nothing_and_frees_the_desk(issuer: Issuer) -> None:
    with pytest.raises(InviteError, match="numbers differ"):
        await ask(issuer, saying(False))
    await trio.testing.wait_all_tasks_blocked()
    assert comparisons(issuer).pending is None
    with pytest.raises(ConfigError, match="no machine waits"):
        comparisons(issuer).approve("123456")


async def test_a_wrong_number_at_the_issuer_turns_the_joiner_away_for_good(issuer: Issuer) -> None:
    def mistype(number: str) -> None:
        wrong = f"{(int(number) + 1) % 10**6:06d}"
        with pytest.raises(ConfigError, match="turned away"):
            comparisons(issuer).approve(wrong)
        with pytest.raises(ConfigError, match="no machine waits"):
            comparisons(issuer).approve(number)

    with pytest.raises(MeshError):
        await ask(issuer, saying(True, before=mistype))


async def test_the_issuer_alone_admits_nobody(issuer: Issuer) -> None:
    """Approved there, refused here: the certificate is never made."""
    with pytest.raises(InviteError, match="numbers differ"):
        await ask(issuer, saying(False, before=lambda number: comparisons(issuer).approve(number)))


async def test_a_second_joiner_is_told_to_wait(issuer: Issuer) -> None:
    async def second(number: str) -> bool:
        with pytest.raises(InviteError, match="another machine is joining"):
            await ask(issuer, saying(True))
        await trio.testing.wait_all_tasks_blocked()
        comparisons(issuer).approve(number)
        return True

    assert (await ask(issuer, second)).credentials.role is Role.MEMBER


async def test_an_issuer_takes_ten_joiners_an_hour(issuer: Issuer) -> None:
    for _ in range(limits.COMPARISONS_PER_HOUR):
        with pytest.raises(InviteError, match="numbers differ"):
            await ask(issuer, saying(False))
        await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(InviteError, match="too many machines"):
        await ask(issuer, saying(True))


async def test_nobody_at_the_issuer_means_no_after_its_time(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COMPARISON_S", 0.0)

    with pytest.raises(MeshError):
        await ask(issuer, saying(True))
    await trio.testing.wait_all_tasks_blocked()
    assert comparisons(issuer).pending is None


async def test_a_revoked_key_is_turned_away_before_anybody_is_asked(issuer: Issuer) -> None:
    mine = Ed25519PrivateKey.generate()
    asked: list[str] = []

    async def same(number: str) -> bool:
        asked.append(number)
        return True

    issuer.desk.barred = lambda node: node == node_id_of(spki_of(mine.public_key()))
    with pytest.raises(InviteError, match="key was revoked from the mesh"):
        await join_by_number([issuer.address], "", "kitchen", mine, issuer.now, same)
    await trio.testing.wait_all_tasks_blocked()
    assert (asked, comparisons(issuer).pending) == ([], None)


async def test_a_key_that_is_revoked_while_two_people_compare_gets_nothing(issuer: Issuer) -> None:
    def approve(number: str) -> None:
        issuer.desk.barred = lambda node: True
        comparisons(issuer).approve(number)

    with pytest.raises(InviteError, match="key was revoked from the mesh"):
        await ask(issuer, saying(True, before=approve))


async def test_a_revoked_issuer_lets_nobody_in_by_number(issuer: Issuer) -> None:
    issuer.desk.revoked = lambda who: who == issuer.desk.issuer
    with pytest.raises(PeerError, match="admits nobody"):
        await ask(issuer, saying(True))


async def test_without_the_local_network_or_a_desk_there_is_no_joining_by_number(issuer: Issuer) -> None:
    issuer.desk.comparisons = None
    with pytest.raises(InviteError, match="without an invite"):
        await ask(issuer, saying(True))


async def test_another_mesh_than_the_hint_said_is_not_asked(issuer: Issuer) -> None:
    with pytest.raises(PeerError, match="another mesh"):
        await ask(issuer, saying(True), mesh="a" * 16)
    assert comparisons(issuer).pending is None


async def test_a_name_with_terminal_codes_is_shown_without_them(issuer: Issuer) -> None:
    seen: list[str] = []
    with pytest.raises(InviteError):
        await ask(issuer, saying(False, before=lambda number: seen.append(pending(issuer).name)), name="a\x1b[2Jb")
    assert seen == ["a?[2Jb"]
