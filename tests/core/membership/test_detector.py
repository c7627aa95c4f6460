"""Who is declared dead, by whom and when; and who is not."""

from __future__ import annotations

import pytest

from meshnode.core.membership.announcement import Body
from meshnode.core.membership.detector import HEALTH_MAX
from meshnode.core.membership.rules import Rules
from meshnode.core.membership.suspicion import Suspicion, suspect
from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.identity.ids import NodeId
from meshnode.wire.messages import Leave, Suspect
from tests.core.node.mesh import MESH, HashAuthority, World, name_to_id


def mesh(count: int, rules: Rules | None = None) -> World:
    world = World(rules=rules or Rules())
    names = [f"n{index}" for index in range(count)]
    for name in names:
        world.add(name, 100)
    world.meet(*names)
    world.run(3)
    return world


def power_off(world: World, name: str) -> NodeId:
    """The machine is gone: no link says so."""
    return world.nodes.pop(name).node


def present(world: World, name: str, node: NodeId) -> bool:
    return world.nodes[name].roster.entries[node].present


def verdict_of(world: World, author: str, target: str, *, alone: bool = False, number: int = 0) -> Suspect:
    body = world.nodes[target].membership.voice.body
    assert isinstance(body, Body)
    node = name_to_id(author)
    sequence = number or body.sequence
    told = Suspicion(MESH, node, name_to_id(target), body.incarnation, sequence, alone)
    return suspect(told, HashAuthority(node))


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_a_machine_without_power_is_dead_for_everybody_in_time(count: int) -> None:
    world = mesh(count)
    gone = power_off(world, "n1")
    world.run(10 if count > 2 else 14)
    assert not any(present(world, name, gone) for name in world.nodes)
    assert [peer.state for peer in world.status("n0").peers if peer.node == gone] == ["dead"]


def test_three_machines_that_vanish_at_once_are_all_found_by_the_last_one() -> None:
    world = mesh(4)
    gone = [power_off(world, name) for name in ("n1", "n2", "n3")]
    world.run(20)
    assert not any(present(world, "n0", node) for node in gone)


def test_a_short_pause_kills_nobody() -> None:
    world = mesh(5)
    paused = world.nodes.pop("n1")
    world.run(1)
    world.nodes["n1"] = paused
    world.run(10)
    assert world.sent(Suspect) == []
    assert all(present(world, name, paused.node) for name in world.nodes if name != "n1")


def test_who_slept_suspects_itself_first() -> None:
    world = mesh(5)
    slept = world.nodes.pop("n1")
    world.run(2.5)
    world.nodes["n1"] = slept
    world.hand("n1", on.TimePassed())
    assert 1 < slept.membership.detector.health <= HEALTH_MAX
    before = len(world.sent(Suspect))
    world.run(2)
    assert all(told.author != slept.node for told in world.sent(Suspect)[before:])
    assert all(present(world, name, slept.node) for name in world.nodes if name != "n1")


def test_unreachable_from_one_node_is_no_suspicion() -> None:
    world = mesh(5)
    world.cut.add(frozenset((name_to_id("n0"), name_to_id("n1"))))
    world.run(30)
    assert world.sent(Suspect) == []
    assert present(world, "n0", name_to_id("n1"))
    assert [peer.state for peer in world.status("n0").peers if peer.name == "n1"] == ["lost"]


def test_one_observer_that_lies_kills_nobody_and_is_refuted() -> None:
    world = mesh(5)
    number = world.nodes["n1"].membership.voice.sequence
    lie = verdict_of(world, "n2", "n1")
    for name in ("n0", "n3", "n4"):
        world.hand(name, on.Received(name_to_id("n2"), lie))
    assert world.nodes["n0"].membership.detector.suspected(name_to_id("n1"))
    world.run(5)
    assert world.nodes["n1"].membership.voice.sequence == number + 1
    assert not world.nodes["n0"].membership.detector.suspected(name_to_id("n1"))
    assert all(present(world, name, name_to_id("n1")) for name in ("n0", "n3", "n4"))


def test_without_refutation_two_lies_kill() -> None:
    """What the simulator must find."""
    for rules, survives in ((Rules(), True), (Rules(refutation=False), False)):
        world = mesh(5, rules)
        for liar in ("n2", "n3"):
            world.hand("n0", on.Received(name_to_id(liar), verdict_of(world, liar, "n1")))
        world.run(6)
        assert present(world, "n0", name_to_id("n1")) == survives


def test_a_suspicion_of_an_older_number_or_by_a_stranger_counts_nothing() -> None:
    world = mesh(4)
    world.hand("n1", on.CacheChanged({"ab": ((0, 1),)}))
    world.run(2)
    target = name_to_id("n1")
    for record in (verdict_of(world, "n2", "n1", number=1), verdict_of(world, "stranger", "n1")):
        world.hand("n0", on.Received(name_to_id("n2"), record))
        assert not world.nodes["n0"].membership.detector.suspected(target)


def test_a_forged_suspicion_closes_the_link_that_brought_it() -> None:
    world = mesh(4)
    honest = verdict_of(world, "n2", "n1")
    world.hand("n0", on.Received(name_to_id("n3"), Suspect(honest.author, honest.body, b"\0" * 32)))
    assert [effect.peer for effect in world.effects("n0", do.CloseLink)] == [name_to_id("n3")]


def test_who_was_dead_comes_back_by_restarting() -> None:
    world = mesh(4)
    gone = power_off(world, "n1")
    world.run(12)
    assert not present(world, "n0", gone)
    world.add("n1", 100, incarnation=2)
    world.meet("n2", "n1")
    world.run(3)
    assert all(present(world, name, gone) for name in ("n0", "n2", "n3"))


def test_a_healed_partition_is_one_mesh_again_within_ten_seconds() -> None:
    world = mesh(6)
    halves = [[name_to_id(f"n{index}") for index in part] for part in ((0, 1, 2), (3, 4, 5))]
    world.cut = {frozenset((one, two)) for one in halves[0] for two in halves[1]}
    world.run(40)
    assert not present(world, "n0", name_to_id("n4"))
    world.cut.clear()
    world.run(10)
    assert all(entry.present for mediator in world.nodes.values() for entry in mediator.roster.entries.values())
    assert len({mediator.membership.digest.root() for mediator in world.nodes.values()}) == 1


def test_a_clean_leave_reaches_those_who_are_not_linked() -> None:
    world = mesh(4)
    world.hand("n1", on.Stopping())
    assert world.sent(Leave)
    world.run(1)
    for name in ("n0", "n2", "n3"):
        assert world.nodes[name].roster.entries[name_to_id("n1")].left


def test_a_goodbye_that_was_held_up_says_nothing_of_the_next_life() -> None:
    world = mesh(3)
    world.crash("n1")
    world.add("n1", 100, incarnation=2)
    world.meet("n2", "n1")
    world.run(3)
    world.hand("n0", on.Received(name_to_id("n1"), Leave()))
    assert [effect.peer for effect in world.effects("n0", do.CloseLink)] == [name_to_id("n1")]
    world.run(3)
    assert present(world, "n0", name_to_id("n1"))
    assert world.nodes["n0"].links.up(name_to_id("n1"))


def test_a_link_that_is_forgotten_is_closed_so_that_nobody_is_linked_unknown() -> None:
    world = mesh(3)
    left = world.nodes["n1"].node
    world.hand("n1", on.Stopping())
    world.run(1)
    for name in ("n0", "n2"):
        assert left in [effect.peer for effect in world.effects(name, do.CloseLink)]
        assert left not in world.nodes[name].links.links


def test_a_link_whose_end_is_never_told_is_dialed_again() -> None:
    """The shell tells it within a second or not at all: the queue of events may be full for longer."""
    world = mesh(2)
    node, other = world.nodes["n0"], name_to_id("n1")
    world.hooks.append(lambda _, effect: isinstance(effect, do.Send | do.CloseLink | do.Dial))
    world.run(9)
    assert node.links.links[other].closing
    before = len(world.effects("n0", do.Dial))
    world.run(9)
    assert not node.links.up(other)
    assert len(world.effects("n0", do.Dial)) == before + 1


def test_who_is_left_alone_tries_those_who_left() -> None:
    world = mesh(2)
    world.hand("n1", on.Stopping())
    world.run(1)
    world.crash("n1")
    world.run(20)
    assert [peer.state for peer in world.status("n0").peers] == ["left"]
    world.add("n1", 100, incarnation=2)
    world.run(12)
    assert present(world, "n0", name_to_id("n1")), "although nobody told n1 where n0 is"
