from collections import deque
from dataclasses import replace

from meshnode.core.coordination.run import State
from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from sim.liar import KINDS, Liar
from sim.machine import Clock, Machine
from sim.profiles import CALM, PROFILES
from sim.trial import populate
from sim.world import World


def settled(nodes: int = 4) -> tuple[World, list[Machine]]:
    world = World(1, CALM)
    populate(world, nodes)
    world.agenda.run(10.0)
    assert world.checks.differences() == []
    return world, list(world.machines.values())


def test_a_clock_that_runs_fast_and_began_elsewhere_can_be_read_both_ways() -> None:
    clock = Clock(rate=1.25, offset=1000.0)

    assert clock.read(8.0) == 1010.0
    assert clock.when(1010.0) == 8.0


def test_a_crash_keeps_what_is_on_disk_and_loses_the_rest() -> None:
    world, machines = settled()
    world.serve(machines[0])
    world.agenda.run(20.0)
    holder = next(m for m in machines[1:] if m.mediator is not None and m.mediator.ledger.held)
    promised = dict(holder.mediator.ledger.promised) if holder.mediator else {}

    holder.crash(power=True)
    world.agenda.run(21.0)
    holder.start()

    assert holder.mediator is not None
    assert promised
    assert holder.mediator.ledger.promised == promised
    assert not holder.mediator.ledger.held
    assert holder.me.incarnation == 2
    assert set(holder.disk.peers) == {m.node for m in machines if m is not holder}


def test_a_full_disk_leaves_out_the_grant_behind_the_write() -> None:
    world, machines = settled()
    for machine in machines[1:]:
        machine.disk.full = True
    world.serve(machines[0])

    world.agenda.run(12.0)

    assert machines[0].mediator is not None
    run = next(iter(machines[0].mediator.deployments.values())).run
    assert run is not None
    assert run.granted == {machines[0].node}


def test_a_disk_that_is_full_at_the_commit_ends_the_attempt_at_once_and_the_next_one_serves() -> None:
    world, machines = settled()
    coordinator = machines[0]
    world.serve(coordinator)
    assert coordinator.mediator is not None
    (deployment,) = coordinator.mediator.deployments.values() or (None,)
    assert deployment is not None
    while deployment.attempt is None or deployment.attempt.state is not State.CONNECTING:
        world.agenda.run(world.now + 0.01)
    attempt = deployment.attempt
    coordinator.disk.full = True
    world.agenda.run(world.now + 1.0)
    assert attempt.state is State.ENDED
    coordinator.disk.full = False
    world.agenda.run(world.now + 8.0)  # what waits for an answer gives up after 10 s
    assert deployment.current is not None
    assert coordinator.engine.serving == {deployment.current.fence}


def test_a_head_that_could_not_be_given_its_requests_is_not_believed_to_serve() -> None:
    world, machines = settled()
    coordinator = machines[0]
    world.serve(coordinator)
    world.agenda.run(20.0)
    assert coordinator.mediator is not None
    (deployment,) = coordinator.mediator.deployments.values()
    assert deployment.current is not None
    before = deployment.current.fence
    coordinator.disk.full = True
    coordinator._execute(deque([do.Persist(b""), do.ServeHead(before)]))
    coordinator.disk.full = False
    world.agenda.run(30.0)
    assert deployment.current is not None
    assert deployment.current.fence > before
    assert coordinator.engine.serving == {deployment.current.fence}


def test_a_full_disk_keeps_no_stage_alive_that_the_ledger_let_go() -> None:
    world, machines = settled()
    world.serve(machines[0])
    world.agenda.run(30.0)
    holder = next(m for m in machines[1:] if m.mediator is not None and m.mediator.ledger.held)
    (fence,) = holder.mediator.ledger.held if holder.mediator else ()
    done: list[do.Effect] = []
    holder.engine.carry_out = done.append
    holder.disk.full = True

    holder._execute(deque([do.Persist(b""), do.ServeHead(fence), do.StopStages(fence)]))

    assert done == [do.StopStages(fence)]


def test_a_machine_that_stands_still_hears_everything_when_it_goes_on() -> None:
    world, (one, two, *_) = settled()
    two.pause()
    one.hand(on.CacheChanged({"0" * 64: ((0, 1),)}))
    world.agenda.run(11.5)
    assert two.mediator is not None
    assert two.mediator.roster.entries[one.node].body.number != one.authority.announced

    two.resume()

    assert two.mediator.roster.entries[one.node].body.number == one.authority.announced


def test_every_kind_of_lie_is_told_and_none_is_believed() -> None:
    world = World(3, replace(PROFILES["lan"], faults=()))
    populate(world, 4)
    machines = list(world.machines.values())
    liar = Liar(world, machines[1], 60.0, every_s=0.1)
    liar.begin()
    world.agenda.at(5.0, lambda: world.serve(machines[0]))

    world.agenda.run(60.0)

    assert all(liar.told[kind] for kind in KINDS), liar.told
    world.agenda.run(90.0)
    assert world.checks.differences(under_way_s=10.0) == []


def test_a_revoked_member_is_shut_out_everywhere_and_after_a_restart_too() -> None:
    world, machines = settled(5)
    issuer, victim, late = machines[0], machines[2], machines[3]
    late.crash(power=True)
    world.mint.revoke([victim.node])
    assert world.mint.last_list is not None
    issuer.hand(on.Revoked(world.mint.last_list))
    world.agenda.run(12.0)
    late.start()
    world.agenda.run(30.0)
    late.crash(power=False)
    late.start()
    world.agenda.run(40.0)

    assert world.checks.differences(under_way_s=10.0) == []
    assert all(victim.node not in machine.links for machine in world.members())
    assert late.disk.revocations is not None
