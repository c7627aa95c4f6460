"""From one run of a deployment to the next, seen by several mediators: what serves goes on until the new run serves."""

from __future__ import annotations

import pytest

from meshnode.core.coordination.run import State
from meshnode.core.membership.announcement import Speed
from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.core.node.deployments import KEEP_S, LOOK_S, SPARE_S, Deployment
from meshnode.core.planning.hysteresis import LASTING_S
from meshnode.errors import StaleFence
from meshnode.wire.fence import Fence
from meshnode.wire.messages import (
    Abort,
    Claim,
    Commit,
    Connect,
    Connected,
    Failed,
    FenceOff,
    Prepare,
    Refuse,
)
from tests.core.node.mesh import World, footprint, name_to_id

NODES = ("a", "b", "c")


def deployment(world: World, name: str = "a") -> Deployment:
    return next(iter(world.nodes[name].deployments.values()))


def serves(world: World) -> Fence:
    """The fence of the run that takes requests at present."""
    open_heads: list[Fence] = []
    for owner, effect in world.log:
        if owner != "a" or not isinstance(effect, do.ServeHead | do.DrainHead | do.CloseHead):
            continue
        if isinstance(effect, do.ServeHead):
            open_heads.append(effect.fence)
        elif effect.fence in open_heads:
            open_heads.remove(effect.fence)
    assert len(open_heads) == 1, "exactly one head takes requests"
    return open_heads[0]


def used(world: World) -> set[str]:
    return {stage.name for stage in world.status("a").deployments[0].stages}


def roomy(*names: str, memory_mb: int = 2000) -> World:
    """Nodes that hold the model alone, or two runs of it."""
    world = World()
    for name in names:
        world.add(name, memory_mb)
    world.meet(*names)
    world.run(2)
    return world


@pytest.fixture
def split() -> World:
    """Served by a and b together; then c comes, which holds the whole model."""
    world = World()
    for name in ("a", "b"):
        world.add(name, 700)
    world.meet("a", "b")
    world.run(2)
    world.serve("a")
    world.run(2)
    assert used(world) == {"a", "b"}
    return world


def join(world: World, memory_mb: int = 2000) -> None:
    """A machine ten times as fast as what is assumed of the others."""
    world.add("c", memory_mb)
    world.hand("c", on.Measured({"q8_0": Speed(decode_bytes_per_s=10**11)}, {}))
    world.meet("a", "c")


def test_a_node_that_joins_with_more_memory_takes_over_when_the_gain_lasted(split: World) -> None:
    first = serves(split)
    join(split)
    split.run(LASTING_S - 1)
    assert serves(split) == first
    split.run(2 * LOOK_S + 4)
    assert serves(split).term == first.term + 1
    assert used(split) == {"c"}
    split.run(5)
    assert not split.nodes["b"].ledger.held, "the former run is fenced and freed"
    assert not split.nodes["a"].ledger.held


def test_the_former_run_drains_before_it_is_fenced_and_no_request_is_without_a_head(split: World) -> None:
    first = serves(split)
    join(split)
    split.run(LASTING_S + 2 * LOOK_S + 10)
    kinds = (do.ServeHead, do.DrainHead, do.CloseHead)
    heads = [effect for owner, effect in split.log if owner == "a" and isinstance(effect, kinds)]
    second = serves(split)
    assert heads == [do.ServeHead(first), do.ServeHead(second), do.DrainHead(first), do.CloseHead(first)]
    log = [e.message for _, e in split.log if isinstance(e, do.Send) and isinstance(e.message, FenceOff)]
    assert {m.fence for m in log} == {second}


def test_no_plan_is_made_again_of_what_gave_no_gain(split: World) -> None:
    split.run(2 * LOOK_S)
    before = len(split.effects("a", do.MakePlan))
    for _ in range(10):
        split.hand("b", on.CacheChanged(split.cached["b"]))
        split.run(LOOK_S)
    assert len(split.effects("a", do.MakePlan)) == before


def test_a_gain_that_does_not_last_changes_nothing(split: World) -> None:
    first = serves(split)
    join(split)
    split.run(LASTING_S / 2)
    split.hand("c", on.Stopping())
    split.run(0.1)
    split.crash("c")
    split.run(2 * LASTING_S)
    assert serves(split) == first


STEPS = {
    "claim": lambda message: isinstance(message, Claim),
    "prepare": lambda message: isinstance(message, Prepare),
    "connect": lambda message: isinstance(message, Connect),
    "commit": lambda message: isinstance(message, Commit),
}


@pytest.mark.parametrize("victim", ["b", "c"])
@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("how", ["crash", "failure"])
def test_a_failure_at_each_step_at_each_participant_leaves_what_serves(step: str, victim: str, how: str) -> None:
    """The former run is a's alone; its successor needs b and c. Requirement 75."""
    world = roomy("a", "b", "c", memory_mb=1300)
    world.serve("a")
    world.run(2)
    first = serves(world)
    assert used(world) == {"a"}
    world.nodes["b"].ledger.capacity = world.nodes["c"].ledger.capacity = 700_000_000
    for name in ("b", "c"):
        world.nodes[name].me = world.nodes[name].me.__class__(name, "member", (f"{name}:1",), 700_000_000, 1)
        world.hand(name, on.CacheChanged({}))
    world.run(2)  # everybody heard of it
    struck = False

    def strike(name: str, effect: do.Effect) -> bool:
        nonlocal struck
        to_victim = isinstance(effect, do.Send) and effect.peer == name_to_id(victim) and STEPS[step](effect.message)
        if name != "a" or not to_victim or struck:
            return False
        struck = True
        if how == "crash":
            world.later(lambda: world.crash(victim), 0.005)
            return False
        fence = effect.message.fence
        node = name_to_id(victim)
        answer = Refuse(fence, "d1", "no_room", "full") if step == "claim" else Failed(fence, 0, "load", "no")
        if step != "claim":
            claim = deployment(world).attempt.claim
            own = next(stage.stage for stage in claim.stages if stage.node == node)
            answer = Failed(fence, own, "load", "no")
        world.later(lambda: world.hand("a", on.Received(node, answer)))
        return True

    world.hooks.append(strike)
    world.hand("a", on.DrainWanted(name_to_id("a")))
    world.run(2 * LOOK_S)
    assert struck
    world.hooks.clear()
    ended = [e for e in world.effects("a", do.CloseHead) if e.fence == first]
    if ended:
        assert any(e.fence.term > first.term for e in world.effects("a", do.ServeHead)), "only for a later run"
    if how == "crash":
        assert serves(world) == first, "two nodes are not enough without the victim: what serves goes on"
    else:
        world.run(60)
        assert serves(world).term > first.term
        assert used(world) == {"b", "c"}


@pytest.mark.parametrize("asked_at", ["a", "b"])
def test_whoever_wants_to_switch_a_machine_off_does_not_wait_for_the_next_look(asked_at: str) -> None:
    """Also where the coordinator itself is the one, of which no announcement comes in."""
    world = roomy(*NODES, memory_mb=1300)
    world.serve("a")
    world.run(LOOK_S + 2)
    first = serves(world)
    world.hand("a", on.LinkOpened(name_to_id("b")))  # something was looked at just now
    world.run(0.5)
    world.hand(asked_at, on.DrainWanted(name_to_id("a")))
    world.run(SPARE_S + 1)
    assert serves(world) != first


def test_a_node_that_is_to_leave_is_spared_first() -> None:
    world = roomy(*NODES, memory_mb=1300)
    world.serve("a")
    world.run(2)
    first = serves(world)
    world.hand("b", on.DrainWanted(name_to_id("a")))
    world.run(LOOK_S + 4)
    assert serves(world) != first
    assert "a" not in used(world)
    world.run(2)
    assert not world.nodes["a"].ledger.held
    world.hand("b", on.DrainWanted(name_to_id("a"), draining=False))
    world.run(1)
    assert not world.nodes["a"].draining


def test_where_memory_holds_one_run_only_the_former_ends_when_all_is_fetched() -> None:
    world = World()
    for name in (*NODES, "d"):
        world.add(name, 460)
    world.meet(*NODES, "d")
    world.run(2)
    world.serve("a")
    world.run(2)
    first = serves(world)
    leaver = sorted(used(world) - {"a"})[0]
    world.log.clear()
    world.hand("a", on.DrainWanted(name_to_id(leaver)))
    world.run(LOOK_S + 6)
    held = [e.order for _, e in world.log if isinstance(e, do.PrepareStage)]
    assert [order.hold for order in held].count(True) == [order.hold for order in held].count(False) > 0
    effects = [effect for _, effect in world.log]
    drained = effects.index(do.DrainHead(first))
    assert all(effects.index(e) < drained for e in effects if isinstance(e, do.PrepareStage) and e.order.hold)
    assert all(effects.index(e) > drained for e in effects if isinstance(e, do.PrepareStage) and not e.order.hold)
    assert leaver not in used(world)
    assert world.status("a").deployments[0].state == "serving"


def test_what_ended_to_make_room_is_loaded_again_when_its_successor_fails() -> None:
    world = World()
    for name in (*NODES, "d"):
        world.add(name, 460)
    world.meet(*NODES, "d")
    world.run(2)
    world.serve("a")
    world.run(2)
    first = used(world)
    leaver = sorted(first - {"a"})[0]

    def refuse_to_connect(name: str, effect: do.Effect) -> bool:
        if name == "a" or not isinstance(effect, do.ConnectStages):
            return False
        own = world.nodes[name].ledger.held[effect.fence].own(name_to_id(name))
        world.report(name, Failed(effect.fence, own[0].stage, "unreachable", "no"))
        return True

    world.hooks.append(refuse_to_connect)
    world.hand("a", on.DrainWanted(name_to_id(leaver)))
    world.run(LOOK_S + 3)
    assert world.status("a").deployments[0].state != "serving"
    world.hooks.clear()
    world.run(15)
    assert world.status("a").deployments[0].state == "serving"
    assert used(world) == first


def test_slices_of_a_broken_run_are_kept_by_those_who_load_the_same_ones_again() -> None:
    world = World()
    for name in NODES:
        world.add(name, 600)
    world.meet(*NODES)
    world.run(2)
    world.serve("a")
    world.run(2)
    first = serves(world)
    victim = next(stage for stage in deployment(world).current.claim.stages if stage.node == name_to_id("b"))
    world.log.clear()
    world.report("b", Failed(first, victim.stage, "stage_lost", "killed"))
    world.run(2)
    assert serves(world).term == 2
    kept = {owner: effect.kept for owner, effect in world.log if isinstance(effect, do.StopStages)}
    assert kept["b"] == ()
    for name in ("a", "c"):
        assert [(k.fence, k.stage) for k in kept[name]] == [(serves(world), k.before) for k in kept[name]]
        assert len(kept[name]) == 1


def test_what_nobody_takes_over_is_freed() -> None:
    world = roomy("a", "b", memory_mb=700)
    world.serve("a")
    world.run(2)
    assert used(world) == {"a", "b"}
    world.hand("b", on.Stopping())
    world.run(0.1)
    world.crash("b")
    world.run(1)
    assert world.nodes["a"].ledger.held
    world.run(KEEP_S)
    assert not world.nodes["a"].ledger.held
    assert "short" in world.status("a").deployments[0].note


def test_a_successor_that_breaks_while_the_former_drains_gives_the_place_back(split: World) -> None:
    split.streams_s = 1000.0
    first = serves(split)
    join(split)
    split.run(LASTING_S + 2 * LOOK_S + 4)
    assert serves(split).term == first.term + 1
    assert deployment(split).former[first].state is State.DRAINING
    split.crash("c")
    split.run(4)
    assert serves(split) == first
    assert deployment(split).current is not None


def test_an_order_at_or_below_the_fence_is_refused_and_counted(split: World) -> None:
    first = serves(split)
    join(split)
    split.run(LASTING_S + 2 * LOOK_S + 10)
    before = split.nodes["b"].counters["stale_orders"]
    for order in (Connect(first), Commit(first)):
        split.hand("b", on.Received(name_to_id("a"), order))
    assert split.nodes["b"].counters["stale_orders"] == before + 2
    with pytest.raises(StaleFence):
        split.nodes["b"].ledger.authorize(name_to_id("a"), first)


def test_a_frozen_coordinator_ends_its_run_before_it_does_anything_else() -> None:
    world = World()
    for name in NODES:
        world.add(name, 600)
    world.meet(*NODES)
    world.run(2)
    world.serve("a")
    world.run(2)
    first = serves(world)
    stage = deployment(world).current.claim.stages[1]
    late = on.Received(stage.node, Connected(first, stage.stage))
    effects = world.nodes["a"].handle(late, world.now + 13)
    assert effects[0] == do.CloseHead(first)


def test_a_participant_that_slept_obeys_nothing_of_a_run_whose_lease_ended() -> None:
    world = World()
    for name in NODES:
        world.add(name, 600)
    world.meet(*NODES)
    world.run(2)
    world.serve("a")
    world.run(2)
    first = serves(world)
    effects = world.nodes["b"].handle(on.Received(name_to_id("a"), Connect(first)), world.now + 16)
    assert any(isinstance(effect, do.StopStages) for effect in effects)
    assert not any(isinstance(effect, do.ConnectStages) for effect in effects)


def test_the_head_of_a_withdrawn_model_closes_with_every_run_of_it(split: World) -> None:
    split.streams_s = 1000.0
    join(split)
    split.run(LASTING_S + 2 * LOOK_S + 4)
    split.hand("a", on.Withdrawn("d1"))
    split.run(1)
    assert all(not mediator.ledger.held for mediator in split.nodes.values())
    assert {m.reason for m in split.sent(Abort)} >= {"withdrawn"}
    assert footprint().name not in {d.model for d in split.status("a").deployments}


@pytest.mark.parametrize("step", ["load", "probe", "disk"])
def test_a_failure_late_in_the_successor_leaves_what_serves(step: str) -> None:
    """Its stages do not load, its probe does not come back, or the decision cannot be written."""
    world = roomy("a", "b", memory_mb=1300)
    world.serve("a")
    world.run(2)
    first = serves(world)
    full = False

    def strike(name: str, effect: do.Effect) -> bool:
        nonlocal full
        match effect:
            case do.PrepareStage(order=order) if step == "load" and name == "b":
                world.report(name, Failed(order.fence, order.stage, "load_failed", "it does not load"))
                return True
            case do.OpenHead(claim=claim) if step == "probe":
                world.later(lambda: world.hand("a", on.HeadFailed(claim.fence, "the probe did not come back")))
                return True
            case do.Persist() if step == "disk" and name == "a":
                full = True
            case do.Send(message=Commit()) if full:
                return True  # as the runtime: what stands behind a failed write is left out
        return False

    world.hooks.append(strike)
    world.hand("a", on.DrainWanted(name_to_id("a")))
    world.run(LOOK_S + 14)
    assert serves(world) == first
    assert not [e for e in world.effects("a", do.DrainHead) + world.effects("a", do.CloseHead) if e.fence == first]
    world.hooks.clear()
    world.run(60)
    assert serves(world).term > first.term
    assert used(world) == {"b"}
