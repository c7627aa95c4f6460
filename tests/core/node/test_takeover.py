"""What happens to a model when the node that coordinates it is gone: another one goes on, and exactly one."""

from __future__ import annotations

import msgspec
import pytest

from meshnode.core.coordination.run import State
from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.core.node.participant import SILENT_S
from meshnode.core.node.successor import RANK_S
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.messages import Prepare, Refuse
from tests.core.node.mesh import World, footprint, name_to_id

NODES = ("a", "b", "c")


def coordinators(world: World) -> list[str]:
    return [name for name, mediator in world.nodes.items() if mediator.deployments]


def serving(world: World) -> list[str]:
    """Where a run serves."""
    return [
        name
        for name, mediator in world.nodes.items()
        for each in mediator.deployments.values()
        if each.current is not None and each.current.state is State.SERVING
    ]


def silent(world: World, name: str) -> None:
    """Its power is cut: nobody is told, and nothing is answered."""
    gone = world.nodes[name].node
    world.cut |= {frozenset((gone, mediator.node)) for mediator in world.nodes.values()}
    del world.nodes[name]


@pytest.fixture
def world() -> World:
    """Coordinated by a, which has no room for a slice, and loaded by b and c."""
    made = World()
    for name, memory in (("a", 50), ("b", 900), ("c", 700)):
        made.add(name, memory)
    made.meet(*NODES)
    made.run(2)
    made.serve("a")
    made.run(4)
    assert serving(made) == ["a"]
    assert made.nodes["b"].ledger.held
    assert made.nodes["c"].ledger.held
    return made


def test_every_node_knows_what_is_wanted(world: World) -> None:
    for name in NODES:
        assert [demand.model for demand in world.nodes[name].register.demands.wanted()] == ["model"]
        assert world.kept[name]


def test_a_participant_takes_over_within_seconds_and_every_slice_stays_loaded(world: World) -> None:
    prepared = len(world.sent(Prepare))
    before = {name: [e.fence for e in world.effects(name, do.StopStages) if not e.kept] for name in NODES}
    silent(world, "a")
    world.run(6)
    assert len(serving(world)) == 1
    for name in ("b", "c"):
        stops = [e.fence for e in world.effects(name, do.StopStages) if not e.kept]
        assert stops == before[name], "no stage process ended"
        assert [e.kept for e in world.effects(name, do.StopStages)][-1], "its stage goes on in the next run"
    assert len(world.sent(Prepare)) > prepared


def test_only_one_takes_over_and_the_other_follows(world: World) -> None:
    silent(world, "a")
    world.run(20)
    assert coordinators(world) == serving(world)
    assert len(serving(world)) == 1
    opened = [name for name, effect in world.log if isinstance(effect, do.OpenModel)]
    assert opened, "somebody opened the model"


def test_the_next_candidate_claims_when_the_first_cannot_open_the_model(world: World) -> None:
    refused: list[str] = []

    def hook(name: str, effect: do.Effect) -> bool:
        if isinstance(effect, do.OpenModel) and not refused:
            refused.append(name)
            world.later(lambda: world.hand(name, on.ModelNotOpened(effect.demand.deployment, "no disk")))
            return True
        return False

    world.hooks.append(hook)
    silent(world, "a")
    world.run(6 + RANK_S)
    assert serving(world) == [name for name in ("b", "c") if name not in refused]


def test_a_coordinator_that_comes_back_disturbs_nothing(world: World) -> None:
    silent(world, "a")
    world.run(8)
    fence = [m.deployments["d1"].current.fence for m in world.nodes.values() if m.deployments]
    world.cut.clear()
    world.add("a", 50, incarnation=2)
    world.meet("b", "a")
    world.run(15)
    assert [m.deployments["d1"].current.fence for m in world.nodes.values() if m.deployments] == fence


def test_a_coordinator_that_leaves_is_followed_at_once(world: World) -> None:
    world.hand("a", on.Stopping())
    world.run(3)
    assert serving(world) in (["b"], ["c"])


def test_what_is_unloaded_anywhere_is_withdrawn_everywhere(world: World) -> None:
    world.hand("c", on.Withdrawn("d1", 7))
    world.run(3)
    assert not coordinators(world)
    for name in NODES:
        assert not world.nodes[name].register.demands.wanted()
        assert not world.nodes[name].ledger.held
    world.run(30)
    assert not coordinators(world)


def test_what_was_unloaded_while_a_node_was_away_does_not_come_back_with_it(world: World) -> None:
    silent(world, "a")
    world.run(6)
    world.hand("b", on.Withdrawn("d1", 7))
    world.run(2)
    world.cut.clear()
    world.add("a", 50, incarnation=2)
    world.meet("b", "a")
    world.run(20)
    assert not coordinators(world)


def test_two_who_coordinate_one_demand_after_a_partition_become_one() -> None:
    world = World()
    for name in NODES:
        world.add(name, 2000)
    world.meet(*NODES)
    world.run(2)
    world.cached["c"] = {}
    world.serve("a")
    world.run(3)
    digest = next(iter(world.models))
    world.hand("c", on.CacheChanged({digest: ((0, 9),)}))
    world.run(3)
    apart = {frozenset((name_to_id("c"), name_to_id(other))) for other in ("a", "b")}
    world.cut |= apart
    world.run(25)
    assert sorted(serving(world)) == ["a", "c"], "each side serves with what it has"
    world.cut.clear()
    world.run(70)
    assert len(coordinators(world)) == 1
    assert coordinators(world) == serving(world)


def test_who_gives_a_demand_up_says_so_at_once() -> None:
    """Its last word named it as coordinator: others would wait for it until the next one, a minute later."""
    world = World()
    for name in ("a", "b"):
        world.add(name, 600)
    world.meet("a", "b")
    world.run(2)
    world.serve("a", footprint(30))
    world.run(3)
    assert world.nodes["b"].roster.entries[name_to_id("a")].body.coordinates
    world.nodes["a"].coordinator.give_up("d1", world.now)
    world.hand("a", on.TimePassed())
    world.run(1.5)
    assert not world.nodes["b"].roster.entries[name_to_id("a")].body.coordinates


def test_where_layers_are_on_machines_that_are_away_the_status_says_which_one_to_switch_on(world: World) -> None:
    world.crash("a")
    world.run(12)
    assert len(serving(world)) == 1
    (last,) = serving(world)
    other = "b" if last == "c" else "c"
    world.crash(other)
    world.run(40)
    (shown,) = world.status(last).deployments
    assert f"Switch on {other}, which has all of them" in shown.note


@pytest.mark.parametrize("says_goodbye", [True, False])
def test_where_nothing_of_a_model_is_on_the_machines_that_are_there_the_status_names_who_has_it(
    says_goodbye: bool,
) -> None:
    world = World()
    for name, memory in (("a", 2000), ("b", 50)):
        world.add(name, memory)
    world.meet("a", "b")
    world.run(2)
    world.serve("a")
    world.run(4)
    assert serving(world) == ["a"]
    if says_goodbye:
        world.hand("a", on.Stopping())
        world.run(1)
    world.crash("a")
    world.run(40)
    (shown,) = world.status("b").deployments
    assert shown.state == "waiting"
    assert shown.note == "nothing of it is on the machines that are here: switch on a"


def test_who_did_not_run_for_a_while_takes_no_holder_for_silent_whose_words_it_has_yet_to_read(world: World) -> None:
    frozen = world.nodes.pop("c")
    world.run(SILENT_S + 1)
    world.nodes["c"] = frozen
    (run,) = frozen.ledger.held.values()
    later = Fence(Term(run.claim.fence.term + 1), RunId("b" * 16))
    claim = msgspec.structs.replace(run.claim, fence=later, coordinator=world.nodes["b"].node, releases=run.claim.fence)
    world.log.clear()
    world.hand("c", on.Received(world.nodes["b"].node, claim))
    assert [each.reason for each in world.sent(Refuse) if isinstance(each, Refuse)] == ["held"]
    world.run(1)
    assert serving(world) == ["a"]
