"""To whom links are kept is worked out again when, and only when, something that it follows from has changed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from meshnode.core.node import events as on
from meshnode.core.node import outbox
from meshnode.core.node.mediator import Mediator
from meshnode.identity.ids import NodeId
from tests.core.node import mesh
from tests.core.node.mesh import World, name_to_id, revocation


@dataclass
class Counts:
    looks: int = 0
    worked_out: int = 0


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Every mediator of the test compares what it remembers with what follows from its state, after every event."""
    counts = Counts()

    class Compared(Mediator):
        def _keep_links(self) -> None:
            super()._keep_links()
            fresh = frozenset(node for node in super()._partners() if not self.membership.revocations.expelled(node))
            assert self.membership.standing.partners == fresh
            counts.looks += 1

        def _partners(self) -> frozenset[NodeId]:
            counts.worked_out += 1
            return super()._partners()

    monkeypatch.setattr(mesh, "Mediator", Compared)
    return counts


def serving() -> World:
    world = World()
    for name, memory in (("a", 50), ("b", 900), ("c", 700)):
        world.add(name, memory)
    world.meet("a", "b", "c")
    world.run(2)
    world.serve("a")
    world.run(4)
    assert name_to_id("b") in world.nodes["a"].membership.standing.partners
    return world


def test_most_events_work_nothing_out(counts: Counts) -> None:
    world = serving()
    looks, worked_out = counts.looks, counts.worked_out
    world.run(30)
    assert counts.looks - looks > 20 * (counts.worked_out - worked_out)


def test_a_run_that_begins_or_ends_names_others(counts: Counts) -> None:
    world = serving()
    world.hand("c", on.Withdrawn("d1", 1))
    world.run(1)
    assert not any(mediator.membership.standing.partners for mediator in world.nodes.values())


def test_a_lease_that_ends_names_nobody_any_more(counts: Counts) -> None:
    world = serving()
    del world.nodes["a"]
    for mediator in world.nodes.values():
        mediator.cached = {}  # nobody here goes on
    world.run(60)
    assert not world.nodes["b"].ledger.held
    assert not world.nodes["b"].membership.standing.partners


def test_a_successor_names_others_than_before(counts: Counts) -> None:
    world = serving()
    world.crash("a")
    world.run(20)
    assert [name for name, mediator in world.nodes.items() if mediator.deployments]
    assert all(name_to_id("a") not in each.membership.standing.partners for each in world.nodes.values())


def test_who_leaves_is_no_partner(counts: Counts) -> None:
    world = serving()
    world.hand("c", on.Stopping())
    world.run(1)
    assert name_to_id("c") not in world.nodes["a"].membership.standing.partners


def test_who_is_revoked_is_no_partner(counts: Counts) -> None:
    world = serving()
    world.hand("b", on.Revoked(revocation(1, name_to_id("c"))))
    world.run(1)
    assert name_to_id("c") not in world.nodes["a"].membership.standing.partners


def test_whoever_a_message_waits_for_is_a_partner_until_it_is_sent(
    counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = serving()
    a, c = world.nodes["a"], name_to_id("c")
    world.hand("a", on.Withdrawn("d1", 1))
    world.run(1)
    assert c not in a.membership.standing.partners
    world.hand("a", on.LinkClosed(c, "reset"))
    monkeypatch.setattr(outbox, "SMALL", 1)  # as in a mesh of more than 16 nodes
    world.hand("a", on.DrainWanted(c, draining=True))
    assert c in a.membership.standing.partners
    world.hand("a", on.LinkClosed(c, "no answer"))
    assert c not in a.membership.standing.partners, "the message is given up with the dial"
    world.hand("a", on.DrainWanted(c, draining=True))
    assert c in a.membership.standing.partners
    world.run(5)
    assert a.links.up(c)
    assert c not in a.membership.standing.partners
