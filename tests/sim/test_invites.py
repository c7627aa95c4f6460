"""The race for an invite, and what a careless desk would do."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from meshnode.identity.invite_book import InviteBook, JoinRefusal
from sim.checks import Violation
from sim.invites import Desk
from sim.profiles import CALM
from sim.trial import populate
from sim.world import World


def race(uses: int, rivals: int, aims: bool = False) -> World:
    world = World(1, replace(CALM, loss=0.0))
    populate(world, 3)
    world.agenda.run(5.0)
    world.invites.aims = aims
    world.invites.invite(next(iter(world.machines.values())), uses, rivals)
    world.agenda.run(40.0)
    return world


@pytest.mark.parametrize("aims", [False, True], ids=["calm", "the issuer crashes while it writes"])
def test_an_invite_admits_as_many_as_it_says_whoever_comes_first(aims: bool) -> None:
    world = race(2, 4, aims)

    answers = [joiner.answer for joiner in world.invites.races[0].joiners]
    assert sorted(type(answer).__name__ for answer in answers) == ["JoinRefusal", "JoinRefusal", "bytes", "bytes"]
    assert answers.count(JoinRefusal.USED) == 2
    assert world.invites.open() == []
    world.agenda.run(60.0)
    assert len(world.machines) == 5
    assert world.checks.differences() == []


def test_who_waits_is_told_of() -> None:
    world = race(1, 2)
    world.invites.races[0].joiners[0].answer = None

    assert "waits for an answer" in world.invites.open()[0]


def test_a_desk_that_signs_before_its_book_is_on_disk_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(desk: Desk, book: InviteBook, then: Callable[[], None]) -> None:
        desk.book = book
        then()

    monkeypatch.setattr(Desk, "keep", careless)

    with pytest.raises(Violation, match="is not on disk"):
        race(1, 2)


def test_a_desk_that_forgets_who_was_admitted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(desk: Desk, book: InviteBook, then: Callable[[], None]) -> None:
        before = desk.book

        def forget() -> None:
            desk.book = before
            then()

        keep(desk, book, forget)

    keep = Desk.keep
    monkeypatch.setattr(Desk, "keep", forgetful)

    with pytest.raises(Violation, match="an invite for 1 was used by 2 keys"):
        race(1, 2)
