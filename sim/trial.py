"""One run of one world: first everything that can go wrong, then a quiet world in which all must come right in time."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from meshnode.core.coordination.run import State
from meshnode.core.node.mediator import NODE_RULES, NodeRules
from meshnode.identity.ids import NodeId
from sim.agenda import stream
from sim.checks import Violation
from sim.faults import Faults
from sim.liar import Liar
from sim.profiles import PROFILES
from sim.world import World

COLLECT_EVERY = 20_000
"""So many objects more, and cycles are looked for (else 700): most of a world lives as long as the world does."""
FAULTY = 0.4
"""Share of a run in which faults strike; the rest is for coming right."""
CONVERGE_S = 25.0
"""After the heal until all rosters are equal: a redial waits 10 s at most, a dead stream up to 8 s, gossip 5 s."""
ORPHANS_S = 20.0
"""After the heal until nobody holds a run that its coordinator does not know: the longest lease, and a look at it."""
MACHINES = 3
"""That one model needs (world.MEMORY_MB)."""
SERVE_S = 30.0
"""After the heal until the model is served (COORDINATION)."""
NOTICE_S = 15.0
"""From when both machines of a copied key have links until everybody knows: an announcement, its answer, two rounds of
anti-entropy."""
WARY_S = 5.0
"""So long nobody may plan with it, before a person switches the copy off."""
JOIN_S = 1.0
AIMED_S = 3.0
POLL_S = 0.5
UNDER_WAY_S = 10.0
"""Two rounds of anti-entropy: a word that old has arrived everywhere."""


Rank = tuple[int, NodeId, bytes]
Defects = Callable[[], list[str]]


@dataclass(frozen=True)
class Setting:
    """What, together with the code, decides every byte of a run."""

    seed: int
    nodes: int = 20
    profile: str = "wan"
    until: float = 120.0
    rules: NodeRules = NODE_RULES
    aim: str = ""
    """A schedule made for one rule. rush: two nodes claim for two models at once, and there is memory for one of them;
    rival: two nodes coordinate one deployment, as after a partition."""

    @property
    def command(self) -> str:
        """Repeats the run."""
        return f"python -m sim --seed {self.seed} --nodes {self.nodes} --profile {self.profile} --until {self.until:g}"


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    setting: Setting
    trace: str
    events: int
    ended_at: float
    rule: str = ""
    """The broken one; empty when all held."""
    detail: str = ""
    tail: tuple[str, ...] = ()
    """The last events before it, the last one is the bad one."""
    applied: int = 0
    lies: int = 0
    node_seconds: float = 0.0
    answers: int = 0
    """Requests that got all their tokens."""

    @property
    def good(self) -> bool:
        """Whether every rule held."""
        return not self.rule


def run(setting: Setting) -> Outcome:
    """Simulate one world; rules that are broken are found in the outcome."""
    world = World(setting.seed, PROFILES[setting.profile], setting.rules)
    rule = detail = ""
    liars: list[Liar] = []
    thresholds = gc.get_threshold()
    try:
        gc.set_threshold(COLLECT_EVERY, *thresholds[1:])
        liars = _live(world, setting)
    except Violation as violation:
        rule, detail = violation.rule, violation.detail
    except Exception:  # whatever the core raises is what this is looking for
        rule, detail = "exception", traceback.format_exc(limit=-6)
    finally:
        gc.set_threshold(*thresholds)
    return Outcome(
        setting=setting,
        trace=world.trace,
        events=world.events,
        ended_at=world.now,
        rule=rule,
        detail=detail,
        tail=world.tail if rule else (),
        applied=world.checks.applied,
        node_seconds=world.node_seconds,
        answers=world.requests.answered,
        lies=sum(sum(liar.told.values()) for liar in liars),
    )


def _live(world: World, setting: Setting) -> list[Liar]:
    healed_at = setting.until * FAULTY
    populate(world, setting.nodes)
    machines = list(world.machines.values())
    served = machines[-1]
    world.agenda.at(JOIN_S * 2, lambda: world.serve(served) if served.mediator is not None else None)
    if setting.aim:
        world.agenda.at(AIMED_S, lambda: _take_aim(world, setting.aim))
    faults = Faults(world, healed_at)
    faults.begin()
    liars = [Liar(world, machine, healed_at) for machine in machines[1 : 1 + world.profile.liars]]
    for liar in liars:
        liar.begin()
    world.agenda.run(healed_at)
    faults.heal()
    if world.copies:
        copies_until = world.now + NOTICE_S + WARY_S
        _watch_copies(world, copies_until)
        world.agenda.run(min(setting.until, copies_until))
        faults.remove_copies()
    alone_at = world.now
    world.agenda.after(0.0, lambda: world.serve(served) if not _wanted(world) else None)
    _expect(world, setting, "invite", CONVERGE_S, world.invites.open)
    _expect(world, setting, "rosters differ", CONVERGE_S, world.checks.differences)
    _expect(world, setting, "orphans", ORPHANS_S, world.checks.obedience.orphans)
    _expect(world, setting, "demands differ", CONVERGE_S, lambda: _undecided(world))
    _expect(world, setting, "two holders", SERVE_S, lambda: _shared(world))
    if not setting.aim:
        _expect(world, setting, "not served", SERVE_S, lambda: _unserved(world, alone_at))
    world.agenda.run(setting.until)
    last = world.checks.differences(under_way_s=UNDER_WAY_S)
    if last and setting.until >= alone_at + CONVERGE_S:
        world.checks.fail("rosters differ", f"at the end: {last[0]}")
    return liars


def _take_aim(world: World, aim: str) -> None:
    machines = world.running()[:2]
    match aim:
        case "rush":
            for machine in machines:
                world.serve(machine)
        case "rival":
            world.serve(*machines)
        case _:
            raise ValueError(f"there is no schedule {aim!r}")


def populate(world: World, nodes: int) -> None:
    """Machines that come up within a second and know the first one's address."""
    random = stream(world.seed, "begin")
    for index in range(nodes):
        machine = world.add(f"n{index}")
        if index:
            first = next(iter(world.machines.values()))
            machine.disk.peers[first.node] = first.me.addresses
        world.agenda.at(random.uniform(0.0, JOIN_S) if index else 0.0, machine.start)


def _expect(world: World, setting: Setting, rule: str, bound: float, defects: Defects) -> None:
    """Within `bound` of now there must be a moment without defects; a run that ends before proves nothing."""
    deadline = world.now + bound

    def poll() -> None:
        found = defects()
        if not found:
            return
        if world.now >= deadline:
            world.checks.fail(rule, f"{len(found)} after {bound:g} s, first: {found[0]}")
        world.agenda.after(POLL_S, poll)

    if deadline <= setting.until:
        poll()


def _watch_copies(world: World, until: float) -> None:
    """Until a person switches them off, whoever is copied in sight of others is noticed."""

    def poll() -> None:
        late = world.checks.unnoticed(NOTICE_S)
        if late:
            world.checks.fail("copied", f"{len(late)} after {NOTICE_S:g} s with links, first: {late[0]}")
        if world.copies and world.now < until:
            world.agenda.after(POLL_S, poll)

    poll()


def _wanted(world: World) -> bool:
    return bool(world.wanted())


def _holders(world: World, deployment: str) -> list[str]:
    """Machines that care for it."""
    running = [machine for machine in world.members() if machine.mediator is not None]
    return [m.name for m in running if m.mediator is not None and deployment in m.mediator.coordinator.cared_for()]


def _serving(world: World) -> int:
    """How many pipelines serve."""
    running = [machine.mediator for machine in world.members() if machine.mediator is not None]
    runs = [deployment.run for mediator in running for deployment in mediator.deployments.values()]
    return sum(run is not None and run.state is State.SERVING for run in runs)


def _undecided(world: World) -> list[str]:
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


def _shared(world: World) -> list[str]:
    """Demands that more than one cares for."""
    held = {key: _holders(world, key) for key in world.wanted()}
    return [f"{key} is coordinated by {', '.join(names)}" for key, names in held.items() if len(names) > 1]


def _unserved(world: World, since: float) -> list[str]:
    if _wanted(world) and world.requests.answered_at < since:
        return ["nobody got an answer"]
    wanted, serving = world.wanted(), _serving(world)
    alone = [f"{key}: nobody coordinates it" for key in wanted if not _holders(world, key)]
    usable = [machine for machine in world.members() if machine.node not in world.doubled]
    if not alone and serving >= max(1, len(usable) // MACHINES):
        return []  # the others have to wait for memory
    waiting = [
        f"{deployment.demand.deployment} is {deployment.phase.value}: {deployment.note}"
        for machine in world.members()
        if machine.mediator is not None
        for deployment in machine.mediator.deployments.values()
        if deployment.run is None or deployment.run.state is not State.SERVING
    ]
    return alone + waiting
