"""What several mediators decide together."""

from __future__ import annotations

import msgspec
import pytest

from meshnode.core.coordination.ledger import LEASE_S, Word
from meshnode.core.membership.announcement import announce
from meshnode.core.membership.digest import id_of
from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.core.node.deployments import Exclusion
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.messages import (
    Abort,
    Announce,
    Claim,
    ClaimedStage,
    Commit,
    Failed,
    Grant,
    Have,
    Introduce,
    Prepare,
    Refuse,
)
from tests.core.node.mesh import DELAY_S, MB, HashAuthority, World, footprint, name_to_id


@pytest.fixture
def mesh() -> World:
    """Three nodes that know each other; the model fits on all three together only."""
    world = World()
    for name in ("a", "b", "c"):
        world.add(name, 600)
    world.meet("a", "b", "c")
    world.run(2)
    return world


def serving(world: World, name: str = "a") -> bool:
    return any(deployment.state == "serving" for deployment in world.status(name).deployments)


def fence_of(world: World, name: str = "a") -> Fence:
    run = next(iter(world.nodes[name].deployments.values())).run
    assert run is not None
    return run.fence


def test_nodes_that_know_one_common_peer_all_link_to_each_other(mesh: World) -> None:
    for name in ("a", "b", "c"):
        peers = mesh.status(name).peers
        assert [peer.state for peer in peers] == ["linked", "linked"]
        assert {peer.name for peer in peers} == {"a", "b", "c"} - {name}
        assert all(peer.rtt_ms == pytest.approx(2000 * DELAY_S) for peer in peers)


def test_a_node_at_new_addresses_says_so_and_is_dialed_there(mesh: World) -> None:
    mesh.hand("a", on.AddressesChanged(("a:2",)))
    mesh.run(1)
    for name in ("b", "c"):
        assert mesh.nodes[name].addresses_of(name_to_id("a")) == ("a:2",)
    assert mesh.nodes["a"].addresses_of(name_to_id("a")) == ("a:2",)


def test_a_member_that_moved_unheard_is_dialed_where_it_was_seen_and_then_believed_itself(mesh: World) -> None:
    a, b = name_to_id("a"), name_to_id("b")
    mesh.cut = {frozenset((a, b)), frozenset((a, name_to_id("c")))}
    mesh.run(9)
    mesh.log.clear()
    mesh.hand("b", on.PeerFound(a, ("a:2", "a:3", "a:4")))
    mesh.run(6)
    assert do.Dial(a, ("a:2", "a:3", "a:1")) in mesh.effects("b", do.Dial)
    mesh.cut = set()
    mesh.run(6)
    assert mesh.nodes["b"].links.up(a)
    assert mesh.nodes["b"].addresses_of(a) == ("a:1",)


def test_where_a_member_says_itself_that_it_is_nobody_needs_to_hint(mesh: World) -> None:
    mesh.hand("b", on.PeerFound(name_to_id("a"), ("a:1",)))
    assert not mesh.nodes["b"].hints


def test_a_model_that_no_node_can_hold_is_served_by_all_together(mesh: World) -> None:
    mesh.serve("a")
    mesh.run(2)
    deployment = mesh.status("a").deployments[0]
    assert deployment.state == "serving"
    assert {stage.name for stage in deployment.stages} == {"a", "b", "c"}
    assert [stage.first for stage in deployment.stages[1:]] == [stage.last for stage in deployment.stages[:-1]]
    assert len(mesh.sent(Commit)) == 2
    assert all(peer_view.deployments[0].state == "serving" for peer_view in (mesh.status("b"), mesh.status("c")))


def test_a_node_outside_the_run_learns_where_the_model_is_served(mesh: World) -> None:
    mesh.add("d", 0)
    mesh.meet("b", "d")
    mesh.serve("a")
    mesh.run(3)
    assert [(d.model, d.state, d.coordinator) for d in mesh.status("d").deployments] == [
        ("model", "serving", name_to_id("a"))
    ]


def test_the_model_waits_with_a_shortfall_until_enough_machines_have_joined() -> None:
    world = World()
    world.add("a", 600)
    world.serve("a")
    world.run(2)
    waiting = world.status("a").deployments[0]
    assert waiting.state == "waiting"
    assert "short" in waiting.note
    for name in ("b", "c"):
        world.add(name, 600)
        world.meet("a", name)
    world.run(3)
    assert serving(world)


def test_a_grant_is_on_disk_before_it_is_spoken(mesh: World) -> None:
    mesh.serve("a")
    mesh.run(2)
    for name in ("b", "c"):
        effects = [effect for owner, effect in mesh.log if owner == name]
        grant = next(i for i, e in enumerate(effects) if isinstance(e, do.Send) and isinstance(e.message, Grant))
        assert any(isinstance(effect, do.Persist) for effect in effects[:grant])
        mediator = mesh.nodes[name]
        assert mediator.ledger.promised == {"d1": 1}


def test_a_killed_stage_ends_the_run_and_the_next_one_serves(mesh: World) -> None:
    mesh.serve("a")
    mesh.run(2)
    first = fence_of(mesh)
    stage = _stages(mesh, "b")[0].stage
    mesh.report("b", Failed(first, stage, "stage_lost", "killed"))
    mesh.run(DELAY_S * 3)
    assert not serving(mesh)
    mesh.run(2)
    assert serving(mesh)
    assert fence_of(mesh).term == first.term + 1
    assert all(first not in mediator.ledger.held for mediator in mesh.nodes.values())


def test_a_crashed_participant_is_given_up_after_its_grace_and_served_without_it() -> None:
    world = World()
    for name in ("a", "b", "c", "d"):
        world.add(name, 600)
    world.meet("a", "b", "c", "d")
    world.run(2)
    world.serve("a")
    world.run(2)
    used = {stage.name for stage in world.status("a").deployments[0].stages}
    victim = sorted(used - {"a"})[0]
    world.crash(victim)
    world.run(6)
    assert serving(world)
    assert victim not in {stage.name for stage in world.status("a").deployments[0].stages}


def test_a_coordinator_that_vanishes_frees_the_memory_of_its_participants(mesh: World) -> None:
    mesh.serve("a")
    mesh.run(2)
    mesh.crash("a")
    mesh.run(LEASE_S)
    for name in ("b", "c"):
        assert mesh.nodes[name].ledger.reserved == {}
        assert len(mesh.effects(name, do.StopStages)) == 1


def test_a_coordinator_that_comes_back_at_once_finds_its_old_run_gone(mesh: World) -> None:
    mesh.serve("a")
    mesh.run(2)
    mesh.crash("a")
    mesh.run(0.1)
    mesh.add("a", 600, incarnation=2)
    mesh.meet("b", "a")
    mesh.run(2)
    mesh.serve("a")
    mesh.run(3)
    assert serving(mesh)
    assert fence_of(mesh).term == 2, "the promised terms were restored from disk"


def test_a_clean_leave_ends_what_the_node_did_for_others_at_once(mesh: World) -> None:
    mesh.serve("a")
    mesh.run(2)
    mesh.hand("c", on.Stopping())
    mesh.run(DELAY_S * 2)
    assert not serving(mesh)
    mesh.crash("c")
    assert [peer.state for peer in mesh.status("a").peers if peer.name == "c"] == ["left"]
    dials = len(mesh.effects("a", do.Dial))
    mesh.run(20)
    assert "short" in mesh.status("a").deployments[0].note
    assert len(mesh.effects("a", do.Dial)) == dials, "who left is not dialed"


def test_a_refused_claim_is_aborted_everywhere_and_tried_again_with_a_higher_term(mesh: World) -> None:
    mesh.nodes["b"].ledger.words["d1"] = Word(7)
    mesh.serve("a")
    mesh.run(1)
    assert any(refusal.reason == "old_term" for refusal in mesh.sent(Refuse))
    assert mesh.sent(Abort)
    mesh.run(3)
    assert serving(mesh)
    assert fence_of(mesh).term == 8


def test_a_refusal_for_want_of_room_is_believed_before_the_announcement(mesh: World) -> None:
    """b offers 600 MB, and has 300: the next plan uses these, and needs nobody's patience."""
    mesh.nodes["b"].ledger.capacity = 300 * MB
    mesh.serve("a")
    mesh.run(5)
    assert [refusal.reason for refusal in mesh.sent(Refuse)] == ["no_room"]
    assert serving(mesh)
    assert sum(stage.reserved_bytes for stage in _stages(mesh, "b")) <= 300 * MB


def test_where_no_plan_goes_without_it_a_node_without_room_is_waited_for(mesh: World) -> None:
    mesh.nodes["b"].ledger.capacity = 10 * MB
    mesh.nodes["c"].ledger.capacity = 10 * MB
    mesh.serve("a")
    mesh.run(5)
    assert not serving(mesh)
    assert len(mesh.sent(Refuse)) <= 4, "what was refused is not claimed again and again"
    for name in ("b", "c"):
        mesh.nodes[name].ledger.capacity = 600 * MB
    mesh.run(20)
    assert serving(mesh)


def test_a_node_that_failed_is_planned_with_where_nothing_else_fits(mesh: World) -> None:
    failing = [True]
    mesh.hooks.append(lambda name, effect: name == "b" and isinstance(effect, do.PrepareStage) and failing[0])
    mesh.serve("a")
    mesh.run(1)
    failing[0] = False
    own = _stages(mesh, "b")
    mesh.hand("b", on.StageReported(Failed(fence_of(mesh), own[0].stage, "load_failed", "no")))
    assert not serving(mesh)
    mesh.run(5)
    assert serving(mesh), "without b there is no plan, and 30 s are long"


def test_after_a_failure_and_a_shortfall_a_change_of_the_members_makes_a_plan(mesh: World) -> None:
    mesh.serve("a", footprint(90))
    mesh.run(2)
    deployment = mesh.nodes["a"].deployments["d1"]
    deployment.failures = 3
    deployment.excluded[name_to_id("b")] = Exclusion(mesh.now + 600, "failed")
    mesh.hand("c", on.CacheChanged({}))
    mesh.run(1)
    assert deployment.plan_at is not None
    assert deployment.plan_at > mesh.now + 500
    before = len(mesh.effects("a", do.MakePlan))
    mesh.hand("c", on.AddressesChanged(("c:2",)))
    mesh.run(3)
    assert len(mesh.effects("a", do.MakePlan)) == before, "that changes nothing that a plan is made of"
    mesh.hand("c", on.CacheChanged({deployment.footprint.manifest_digest: ((0, 1),)}))
    mesh.run(3)
    assert len(mesh.effects("a", do.MakePlan)) > before


def test_what_others_say_in_a_members_name_is_named_to_that_member(mesh: World) -> None:
    """Otherwise it hears of a second voice with its key by anti-entropy alone, and each of four words takes 5 s."""
    mesh.run(2)
    b = name_to_id("b")
    spoken = mesh.nodes["b"].membership.voice.body
    assert spoken is not None
    other = announce(msgspec.structs.replace(spoken, sequence=spoken.sequence + 5), HashAuthority(b))
    mesh.hand("a", on.Received(name_to_id("c"), other))
    mesh.run(0.3)
    sent = [e for e in mesh.effects("a", do.Send) if isinstance(e, do.Send) and e.peer == b]
    assert Have((id_of(other),)) in [effect.message for effect in sent]


def test_a_stage_that_never_loads_is_given_up_after_the_wait_since_its_last_progress(mesh: World) -> None:
    mesh.hooks.append(lambda name, effect: name == "b" and isinstance(effect, do.PrepareStage))
    mesh.serve("a")
    mesh.run(590)
    assert mesh.status("a").deployments[0].state == "preparing"
    mesh.run(20)
    assert not any(fence.term == 1 for fence in mesh.nodes["c"].ledger.held)


def test_orders_of_another_run_are_refused_and_counted(mesh: World) -> None:
    mesh.serve("a")
    mesh.run(2)
    prepared = next(m for m in mesh.sent(Prepare) if m.upstream.node != name_to_id("b"))
    target = next(n for n in ("b", "c") if any(s.stage == prepared.stage for s in _stages(mesh, n)))
    stranger = Fence(Term(9), RunId("00" * 8))
    for order in (Commit(stranger), Abort(stranger, "x")):
        mesh.hand(target, on.Received(name_to_id("a"), order))
    mesh.hand(target, on.Received(name_to_id("c" if target == "b" else "b"), Abort(prepared.fence, "x")))
    assert mesh.nodes[target].counters["stale_orders"] >= 2
    assert prepared.fence in mesh.nodes[target].ledger.held


def test_a_claim_in_another_nodes_name_closes_the_link(mesh: World) -> None:
    mesh.serve("a")
    mesh.run(2)
    claim = mesh.sent(Claim)[0]
    mesh.hand("b", on.Received(name_to_id("c"), claim))
    assert any(isinstance(e, do.CloseLink) and e.peer == name_to_id("c") for e in mesh.effects("b", do.CloseLink))


def test_a_client_may_not_claim() -> None:
    world = World()
    world.add("a", 2000)
    world.add("x", 2000, role="client")
    world.meet("a", "x")
    world.run(1)
    world.serve("x")
    world.run(2)
    assert not world.nodes["a"].ledger.held


def test_announcements_of_strangers_and_forgeries_are_not_stored(mesh: World) -> None:
    records = [m for m in mesh.sent(Announce) if m.author == name_to_id("c")]
    forged = Announce(records[-1].author, records[-1].body, b"\0" * 32)
    before = mesh.nodes["a"].roster.entries[name_to_id("c")]
    mesh.hand("a", on.Received(name_to_id("b"), forged))
    stranger = Announce(name_to_id("stranger"), records[-1].body, records[-1].signature)
    mesh.hand("a", on.Received(name_to_id("b"), stranger))
    assert mesh.nodes["a"].roster.entries[name_to_id("c")] == before
    assert name_to_id("stranger") not in mesh.nodes["a"].roster.entries


def test_two_models_share_the_memory_and_a_third_is_told_what_is_short() -> None:
    world = World()
    for name in ("a", "b"):
        world.add(name, 700)
    world.meet("a", "b")
    world.run(2)
    world.serve("a", footprint(4, name="one"), "d1")
    world.run(2)
    world.serve("b", footprint(4, name="two"), "d2")
    world.run(2)
    assert serving(world, "a")
    assert serving(world, "b")
    world.serve("a", footprint(4, name="three"), "d3")
    world.run(2)
    third = next(d for d in world.status("a").deployments if d.deployment == "d3")
    assert third.state == "waiting"
    assert "short" in third.note


def test_a_withdrawn_model_frees_everything(mesh: World) -> None:
    mesh.serve("a")
    mesh.run(2)
    mesh.hand("a", on.Withdrawn("d1"))
    mesh.run(1)
    assert all(not mediator.ledger.held for mediator in mesh.nodes.values())
    assert not mesh.status("a").deployments


def test_links_that_were_cut_come_back_and_everything_serves_again(mesh: World) -> None:
    mesh.serve("a")
    mesh.run(2)
    pair = frozenset((name_to_id("a"), name_to_id("b")))
    mesh.cut.add(pair)
    mesh.run(15)
    assert not serving(mesh)
    mesh.cut.clear()
    mesh.run(25)
    assert serving(mesh)


def test_the_same_history_gives_the_same_effects() -> None:
    def history() -> list[object]:
        world = World()
        for name in ("a", "b", "c"):
            world.add(name, 600)
        world.meet("a", "b", "c")
        world.run(2)
        world.serve("a")
        world.run(5)
        world.crash("c")
        world.run(10)
        return list(world.log)

    assert history() == history()


def test_a_report_that_was_on_a_replaced_link_is_not_waited_for(mesh: World) -> None:
    a, b = name_to_id("a"), name_to_id("b")
    mesh.hooks.append(lambda name, effect: name == "b" and isinstance(effect, do.PrepareStage) and not over)
    over: list[bool] = []
    mesh.serve("a")
    mesh.run(1)
    over.append(True)
    first = fence_of(mesh)
    mesh.hand("a", on.LinkOpened(b))
    mesh.hand("b", on.LinkOpened(a))
    mesh.run(5)
    assert serving(mesh)
    assert fence_of(mesh).term > first.term


def test_introductions_travel_once_per_link(mesh: World) -> None:
    mesh.run(200)
    chains = [(m.chain) for m in mesh.sent(Introduce)]
    assert len(chains) < 20


def test_a_peer_that_was_away_for_a_day_is_forgotten(mesh: World) -> None:
    mesh.crash("c")
    mesh.run(2)
    assert [peer.name for peer in mesh.status("a").peers if peer.state != "linked"] == ["c"]
    mesh.nodes["a"].handle(on.TimePassed(), mesh.now + 25 * 3600)
    mesh.nodes["a"].handle(on.TimePassed(), mesh.now + 25 * 3600 + 61)
    assert "c" not in {peer.name for peer in mesh.status("a").peers}


def test_cached_slices_are_told_and_count_for_the_planner(mesh: World) -> None:
    digest = footprint().manifest_digest
    mesh.hand("b", on.CacheChanged({digest: ((2, 5), (7, 8))}))
    mesh.run(1)
    seen = next(node for node in mesh.nodes["a"].inventory("").nodes if node.name == "b")
    assert seen.cached == {digest: ("layer.2", "layer.3", "layer.4", "layer.7")}


def test_an_announcement_fits_whatever_others_make_the_node_hold(mesh: World) -> None:
    model = footprint(9, name="m" * 128)
    for index in range(40):
        mesh.serve("a", model, f"{index:016d}")
    mesh.nodes["a"].cached = {f"{index:064x}": tuple((2 * i, 2 * i + 1) for i in range(100)) for index in range(30)}
    mesh.run(5)
    assert mesh.status("b").peers[0].state == "linked"


def test_a_model_is_served_across_nodes_that_had_no_link_in_a_large_mesh() -> None:
    world = World()
    names = [f"n{index:02}" for index in range(20)]
    for name in names:
        world.add(name, 260)
    world.meet(*names)
    world.run(8)
    assert any(peer.state == "alive" for peer in world.status("n00").peers), "not everybody is linked to everybody"
    world.serve("n00")
    world.run(6)
    used = {stage.node for stage in world.status("n00").deployments[0].stages}
    assert serving(world, "n00")
    assert len(used) >= 5
    assert all(world.nodes["n00"].links.up(node) for node in used - {name_to_id("n00")})
    world.run(400)
    assert fence_of(world, "n00").term == 1, "redrawing links ends no run"


def test_a_run_that_its_coordinator_forgot_is_released_without_a_new_link(mesh: World) -> None:
    mesh.serve("a")
    mesh.run(2)
    mesh.nodes["a"].deployments.clear()
    for mediator in mesh.nodes.values():
        mediator.register.demands.known.clear()  # or another node would go on with it
    assert mesh.nodes["b"].ledger.held
    mesh.run(25)
    assert not any(mesh.nodes[name].ledger.held for name in ("b", "c"))


def test_an_exclusion_that_ended_does_not_make_plans_without_end(mesh: World) -> None:
    mesh.serve("a", footprint(90))
    mesh.run(2)
    deployment = mesh.nodes["a"].deployments["d1"]
    deployment.excluded[name_to_id("b")] = Exclusion(mesh.now + 1, "failed")
    mesh.hand("c", on.CacheChanged({}))
    mesh.run(5)
    before = len(mesh.effects("a", do.MakePlan))
    mesh.run(30)
    assert len(mesh.effects("a", do.MakePlan)) - before <= 3


def _stages(world: World, name: str) -> list[ClaimedStage]:
    held = next(iter(world.nodes[name].ledger.held.values()))
    return held.own(world.nodes[name].node)
