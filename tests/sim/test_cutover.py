"""Whatever goes wrong with a successor, clients of the run that serves do not notice, where memory holds both."""

from __future__ import annotations

import pytest

from meshnode.core.node import events as on
from meshnode.identity.ids import NodeId
from sim.agenda import stream
from sim.machine import Machine
from sim.profiles import CALM
from sim.world import World

EVERY_S = 8.0
UNTIL_S = 120.0


def using(world: World) -> list[Machine]:
    """The machines of the run that serves."""
    runs = [d.current for m in world.running() if m.mediator is not None for d in m.mediator.deployments.values()]
    nodes: set[NodeId] = {stage.node for run in runs if run is not None for stage in run.claim.stages}
    return [machine for machine in world.machines.values() if machine.node in nodes]


def roomy(seed: int, failing: float) -> World:
    """Four machines that each hold the model twice; one that works is to be spared again and again."""
    world = World(seed, CALM)
    for index in range(4):
        world.add(f"n{index}", memory_mb=4000)
    machines = list(world.machines.values())
    for machine in machines:
        if machine is not machines[0]:
            machine.disk.peers[machines[0].node] = machines[0].me.addresses
        machine.start()
    world.agenda.at(2.0, lambda: world.serve(machines[0]))
    world.agenda.at(5.0, lambda: setattr(world.faults, "stage_failure", failing))
    random = stream(seed, "spare")

    def spare() -> None:
        for machine in machines:
            machine.hand(on.DrainWanted(machine.node, draining=False))
        working = using(world)
        if working:
            victim = random.choice(working)
            victim.hand(on.DrainWanted(victim.node))
        if world.now < UNTIL_S:
            world.agenda.after(EVERY_S, spare)

    world.agenda.at(6.0, spare)
    return world


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("failing", [0.0, 0.3], ids=["smooth", "successors fail"])
def test_no_answer_is_lost_while_runs_follow_each_other(seed: int, failing: float) -> None:
    world = roomy(seed, failing)

    world.agenda.run(UNTIL_S)

    assert world.requests.lost == 0
    assert world.requests.answered > 30
    assert world.checks.obedience.cut_overs >= 2
