"""Certificates of real directories, renewed by a real issuer over real TLS."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from meshnode.app.renewal import LOOK_S, is_due, keep_renewed, renewed, require_valid
from meshnode.errors import ConfigError, MeshError
from meshnode.identity.certificates import NODE_VALID, Role, make_node
from meshnode.identity.credentials import Credentials
from meshnode.io.disk.directory import DataDirectory, Membership
from tests.io.transport.issuer import Issuer

DAY = timedelta(days=1)


@pytest.fixture
def data(tmp_path: Path) -> Iterator[DataDirectory]:
    directory = DataDirectory.open(tmp_path / "data")
    yield directory
    directory.close()


@pytest.fixture
async def issuer(nursery: trio.Nursery) -> Issuer:
    return await Issuer().start(nursery)


def joined(data: DataDirectory, issuer: Issuer, age: timedelta) -> Membership:
    """As of a node that joined `age` ago."""
    key = data.node_key()
    own = make_node(issuer.mesh.issuer, key.public_key(), Role.MEMBER, issuer.now - age)
    return data.join_mesh(Credentials(key, (own, issuer.mesh.issuer.certificate), issuer.mesh.root.certificate))


def founded(data: DataDirectory, age: timedelta) -> Membership:
    """As of a node that made its mesh `age` ago."""
    return data.make_mesh(datetime.now(UTC) - age)


@pytest.mark.parametrize(("age", "due"), [(timedelta(0), False), (DAY / 2, False), (1.1 * DAY, True), (9 * DAY, True)])
def test_renewal_is_due_after_a_day(data: DataDirectory, age: timedelta, due: bool) -> None:
    assert is_due(founded(data, age).credentials) == due


async def test_a_joiner_gets_a_fresh_certificate_and_it_is_on_disk(data: DataDirectory, issuer: Issuer) -> None:
    old = joined(data, issuer, 2 * DAY)
    fresh = await renewed(data, old, [issuer.address])
    assert fresh.credentials.node_id == old.credentials.node_id
    assert fresh.credentials.expires - old.credentials.expires > DAY
    again = data.membership(datetime.now(UTC))
    assert again is not None
    assert again.credentials.chain == fresh.credentials.chain


async def test_an_issuer_renews_its_own_and_asks_nobody(data: DataDirectory) -> None:
    old = founded(data, 2 * DAY)
    fresh = await renewed(data, old, [])
    assert fresh.issuer is not None
    assert fresh.credentials.expires > old.credentials.expires


async def test_a_valid_certificate_is_used_as_it_is_at_the_start(data: DataDirectory, issuer: Issuer) -> None:
    held = joined(data, issuer, 3 * DAY)
    assert await require_valid(data, held, []) is held


async def test_an_ended_certificate_is_renewed_at_the_start(data: DataDirectory, issuer: Issuer) -> None:
    held = joined(data, issuer, NODE_VALID + DAY)
    assert held.credentials.expires < datetime.now(UTC)
    assert (await require_valid(data, held, [issuer.address])).credentials.expires > datetime.now(UTC)


async def test_an_ended_certificate_without_an_issuer_says_what_to_do(data: DataDirectory, issuer: Issuer) -> None:
    held = joined(data, issuer, NODE_VALID + DAY)
    with pytest.raises(ConfigError, match="could not be renewed") as told:
        await require_valid(data, held, [])
    assert "meshnode invite" in told.value.hint


async def test_nothing_is_written_on_the_event_loop(data: DataDirectory, issuer: Issuer) -> None:
    old, threads = joined(data, issuer, 2 * DAY), set()

    def heard(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event == "open" and str(data.path) in str(arguments[0]):
            threads.add(threading.get_ident())

    watching = True
    sys.addaudithook(heard)
    await renewed(data, old, [issuer.address])
    watching = False
    assert threads
    assert threading.get_ident() not in threads


class Look:
    """`keep_renewed` under a clock that a test moves; `used` is what it handed on."""

    def __init__(self, clock: MockClock, nursery: trio.Nursery) -> None:
        self.clock = clock
        self.nursery = nursery
        self.used: list[Membership] = []
        self.news = trio.Event()
        self.asked = trio.Event()

    def begin(self, data: DataDirectory, held: Membership, addresses: Callable[[], list[str]]) -> None:
        def asking() -> list[str]:
            self.asked.set()
            return addresses()

        self.nursery.start_soon(keep_renewed, data, lambda: self.used[-1] if self.used else held, asking, self._use)

    async def hour(self) -> None:
        await trio.testing.wait_all_tasks_blocked()
        self.clock.jump(LOOK_S)
        await trio.testing.wait_all_tasks_blocked()

    def _use(self, fresh: Membership) -> None:
        self.used.append(fresh)
        self.news.set()


async def test_a_running_node_renews_when_it_is_due_and_only_then(
    data: DataDirectory, mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    look = Look(mock_clock, nursery)
    look.begin(data, founded(data, 2 * DAY), list)
    await look.hour()
    await look.news.wait()
    for _ in range(3):
        await look.hour()
    assert len(look.used) == 1, "what is fresh is not due"
    assert not is_due(look.used[0].credentials)


async def test_a_running_joiner_renews_over_the_network(
    data: DataDirectory, issuer: Issuer, mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    look = Look(mock_clock, nursery)
    look.begin(data, joined(data, issuer, 2 * DAY), lambda: [issuer.address])
    await look.hour()
    await look.news.wait()
    assert not is_due(look.used[0].credentials)


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), MeshError("no issuer")])
async def test_what_fails_is_tried_again_an_hour_later(
    data: DataDirectory,
    mock_clock: MockClock,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    problem: Exception,
) -> None:
    real, failures = DataDirectory.membership, [problem]

    def membership(self: DataDirectory, now: datetime) -> Membership | None:
        if failures:
            raise failures.pop()
        return real(self, now)

    monkeypatch.setattr(DataDirectory, "membership", membership)
    look = Look(mock_clock, nursery)
    look.begin(data, founded(data, 2 * DAY), list)
    await look.hour()
    await look.asked.wait()
    while failures:  # in a thread
        await trio.lowlevel.checkpoint()
    assert look.used == []
    await look.hour()
    await look.news.wait()
    assert len(look.used) == 1
