"""The checkers find what they are for: each is shown a world in which its rule is broken on purpose."""

from dataclasses import replace

import pytest

from meshnode.core.membership.roster import Roster
from meshnode.core.membership.voice import Voice
from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.core.node.deployments import Deployment
from meshnode.core.planning.inventory import Inventory
from meshnode.wire.demand import Demand, DeploymentId
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.messages import Announce, Grant, Pong
from sim.checks import INSTANT, PLANS, Violation
from sim.machine import Machine
from sim.profiles import CALM
from sim.trial import populate
from sim.world import World, footprint


def settled(nodes: int = 3) -> tuple[World, list[Machine]]:
    world = World(1, CALM)
    populate(world, nodes)
    world.agenda.run(10.0)
    assert world.checks.differences() == []
    return world, list(world.machines.values())


def roster(machine: Machine) -> Roster:
    assert machine.mediator is not None
    return machine.mediator.roster


def test_an_announcement_that_its_author_never_signed_is_found() -> None:
    _world, (one, two, _) = settled()
    entry = roster(one).entries[two.node]
    false = Announce(two.node, entry.record.body, bytes(64))
    roster(one).entries[two.node] = replace(entry, record=false)

    with pytest.raises(Violation, match="forged: n0 believes what"):
        one.hand(on.TimePassed())


def test_a_step_back_to_an_older_number_is_found() -> None:
    world, (one, two, _) = settled()
    old = roster(one).entries[two.node]
    two.hand(on.CacheChanged({"0" * 64: ((0, 1),)}))
    world.agenda.run(15.0)
    assert roster(one).entries[two.node].body.number > old.body.number
    roster(one).entries[two.node] = old

    with pytest.raises(Violation, match="rolled back"):
        one.hand(on.TimePassed())


def test_a_grant_that_is_not_on_disk_is_found() -> None:
    world, (one, two, _) = settled()
    grant = Grant(Fence(Term(3), RunId("0" * 16)), "0" * 16)

    with pytest.raises(Violation, match="broken word: n0 grants"):
        world.checks.obeys(one, do.Send(two.node, grant))


def test_terms_that_do_not_come_back_after_a_restart_are_found() -> None:
    world, machines = settled(4)
    world.serve(machines[0])
    world.agenda.run(20.0)
    holder = next(m for m in machines[1:] if m.mediator is not None and m.mediator.ledger.held)
    holder.crash(power=True)
    holder.disk.ledger = None

    with pytest.raises(Violation, match="after a restart"):
        holder.start()


def test_an_order_of_a_lower_term_after_a_higher_one_is_found() -> None:
    world, machines = settled(4)
    orders: list[do.PrepareStage] = []
    obeys = world.checks.obeys

    def listen(machine: Machine, effect: do.Effect) -> None:
        if isinstance(effect, do.PrepareStage):
            orders.append(effect)
        obeys(machine, effect)

    world.checks.obeys = listen  # type: ignore[method-assign]  # a listener in the checkers' place
    world.serve(machines[0])
    world.agenda.run(20.0)
    holder = next(m for m in machines if any(o.order.fence in m.mediator.ledger.held for o in orders))
    world.checks.obedience.words[holder.node].granted[orders[0].order.deployment] = 9

    with pytest.raises(Violation, match=r"two drivers: n. obeys term 1 after a higher"):
        obeys(holder, orders[0])


def test_a_node_that_never_lets_time_pass_is_found() -> None:
    world, (one, *_) = settled()

    for _ in range(INSTANT - 1):
        world.checks.handled(one, on.TimePassed(), [])

    with pytest.raises(Violation, match="spinning"):
        world.checks.handled(one, on.TimePassed(), [])


def test_too_many_effects_of_one_event_are_found() -> None:
    world, (one, two, _) = settled()

    with pytest.raises(Violation, match="unbounded: 3000 effects"):
        world.checks.handled(one, on.TimePassed(), [do.Send(two.node, Pong(1))] * 3000)


def test_a_run_that_only_its_participant_remembers_is_an_orphan() -> None:
    world, machines = settled(4)
    world.serve(machines[0])
    world.agenda.run(20.0)
    assert world.checks.obedience.orphans() == []

    machines[0].crash(power=True)

    assert world.checks.obedience.orphans() != []


def test_a_node_that_plans_without_pause_is_found() -> None:
    world, (one, *_) = settled()
    assert one.mediator is not None
    world.serve(one)
    world.agenda.run(12.0)
    deployment = next(iter(one.mediator.deployments.values()))
    plan = do.MakePlan("d", 1, deployment.demand, deployment.footprint, Inventory(()))
    for _ in range(PLANS - 1):
        world.checks.obeys(one, plan)

    with pytest.raises(Violation, match="restless"):
        world.checks.obeys(one, plan)


def test_plans_of_who_was_revoked_are_not_the_meshs() -> None:
    world, (one, two, _) = settled()
    world.mint.revoke([two.node])
    plan = do.MakePlan("d", 1, Demand(DeploymentId("d"), 1, one.node, "", "model"), footprint(), Inventory(()))

    for machine in (one, two, two):
        world.checks.obeys(machine, plan)

    assert (world.checks.plans, world.checks.plans_of_members) == (3, 1)


def test_a_node_that_asks_again_for_a_plan_of_what_gave_none_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    world, (one, *_) = settled(2)
    world.serve(one)
    world.agenda.run(12.0)
    assert one.mediator is not None
    (deployment,) = one.mediator.deployments.values()
    assert deployment.note, "two machines are too few"
    monkeypatch.setattr(Deployment, "knows", lambda *_: False)
    deployment.changed(one.last_local)

    with pytest.raises(Violation, match="restless: n0 asks again"):
        world.agenda.run(14.0)


def test_a_link_to_a_revoked_peer_is_found() -> None:
    world, (one, two, _) = settled()
    world.mint.revoke([two.node])
    assert world.mint.last_list is not None
    end = one.links[two.node]
    one.hand(on.Revoked(world.mint.last_list))
    world.agenda.run(11.0)
    assert two.node not in one.links
    one.links[two.node] = end

    with pytest.raises(Violation, match="revoked: n0 keeps a link"):
        one.hand(on.TimePassed())


def test_an_alarm_of_a_copied_key_without_a_copy_is_found() -> None:
    _world, (one, two, _) = settled()
    roster(one).conflicts[two.node] = 0.0

    with pytest.raises(Violation, match=r"copied: n0 takes .* for a copied key"):
        one.hand(on.TimePassed())

    assert two.mediator is not None
    two.mediator.membership.voice.alarm = "why not"
    with pytest.raises(Violation, match="copied: n1 raises the alarm"):
        two.hand(on.TimePassed())


def test_a_key_on_two_machines_is_noticed_by_both_and_by_all_others() -> None:
    world, machines = settled(5)
    world.copy(machines[1]).start()
    world.agenda.run(11.0)
    assert world.checks.unnoticed(0.0) != []

    world.agenda.run(30.0)

    assert world.checks.unnoticed(0.0) == []
    assert world.checks.noticed == {machines[1].node}


def test_nodes_that_do_not_mind_another_voice_with_their_key_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Voice, "heard_itself", lambda *_, **__: False)
    world, machines = settled(5)
    world.copy(machines[1]).start()

    world.agenda.run(40.0)

    assert world.checks.unnoticed(0.0) != []
