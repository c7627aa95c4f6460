"""What the mesh owes to those who asked for a model, judged from outside once nothing goes wrong any more.

demands differ   all know the last word on each demand
two holders      each is cared for by one node at most
not served       each is cared for and served, and answers; but those for which there is no room beside what serves
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnode.core.coordination.run import Run, State
from meshnode.core.node import announcing
from meshnode.core.node.deployments import Deployment
from meshnode.core.planning import Demand, Inventory, NodeInventory, Plan, make_plan
from meshnode.identity.ids import NodeId

if TYPE_CHECKING:
    from sim.world import World

MACHINES = 3
"""That one model needs (world.MEMORY_MB)."""

Rank = tuple[int, NodeId, bytes]


def undecided(world: World) -> list[str]:
    """Demands of which two nodes know different versions."""
    told = {}
    newest: dict[str, Rank] = {}
    for machine in world.members():
        assert machine.mediator is not None
        known = machine.mediator.register.demands.known
        told[machine.name] = {key: each.rank for key, each in known.items()}
    for ranks in told.values():
        newest |= {key: max(rank, newest.get(key, rank)) for key, rank in ranks.items()}
    return [
        f"{name} does not know the last word on {key}"
        for name, ranks in told.items()
        for key, rank in newest.items()
        if ranks.get(key) != rank
    ]


def holders(world: World, key: str) -> list[Deployment]:
    """What the machines that care for it know of it."""
    running = [machine.mediator for machine in world.members() if machine.mediator is not None]
    return [mediator.deployments[key] for mediator in running if key in mediator.coordinator.cared_for()]


def shared(world: World) -> list[str]:
    """Demands that more than one cares for."""
    held = {key: [world.machines[each.coordinator].name for each in holders(world, key)] for key in world.wanted()}
    return [f"{key} is coordinated by {', '.join(names)}" for key, names in held.items() if len(names) > 1]


def unserved(world: World, since: float) -> list[str]:
    """Demands that got no answer since then, or no run although one fits beside those that serve."""
    found, served, waiting = [], 0, []
    for key, demand in world.wanted().items():
        cared = holders(world, key)
        if not cared:
            found.append(f"{key}: nobody coordinates it")
        elif not any(each.current is not None and each.current.state is State.SERVING for each in cared):
            waiting.append((demand, cared[0]))
        elif world.requests.answered_by.get(key, -1.0) < since:
            found.append(f"{key}: nobody got an answer")
        else:
            served += 1
    if not waiting:
        return found
    usable = [machine for machine in world.members() if machine.node not in world.doubled]
    few = served < max(1, len(usable) // MACHINES)
    for demand, deployment in waiting:
        if few or fits(world, demand, deployment):
            found.append(f"{demand.deployment} is {deployment.phase.value}: {deployment.note}")
    return found


def fits(world: World, demand: Demand, deployment: Deployment) -> bool:
    """Whether there is a plan beside what serves, by what the machines really have: attempts that are under way are in
    nobody's way for long, and whoever failed did so before the heal."""
    taken: dict[NodeId, int] = {}
    for run in _loaded(world):
        for stage in run.claim.stages:
            taken[stage.node] = taken.get(stage.node, 0) + stage.reserved_bytes
    nodes = []
    for machine in world.members():
        mediator = machine.mediator
        if mediator is None or machine.node in world.doubled:
            continue
        free = max(0, machine.me.memory_usable - taken.get(machine.node, 0))
        cached, excluded = announcing.artifacts(mediator.cached), "draining" if mediator.draining else ""
        nodes.append(NodeInventory(machine.node, machine.name, free, machine.me.cores, cached, excluded=excluded))
    inventory = Inventory(tuple(nodes), head=NodeId("") if deployment.has_file else deployment.coordinator)
    return isinstance(make_plan(demand, world.models[demand.manifest_digest], inventory), Plan)


def _loaded(world: World) -> list[Run]:
    """Runs that serve, or still have streams to end."""
    running = [machine.mediator for machine in world.members() if machine.mediator is not None]
    runs = [run for mediator in running for each in mediator.deployments.values() for run in each.runs()]
    return [run for run in runs if run.state in (State.SERVING, State.DRAINING)]
