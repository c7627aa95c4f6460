"""One run of one world: first everything that can go wrong, then a quiet world in which all must come right in time."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from meshnode.core.node.mediator import NODE_RULES, NodeRules
from sim import needs
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
SERVE_S = 30.0
"""After the heal until the model is served (COORDINATION)."""
PLANS_PER_S = 0.25
"""Of all machines together, for each: two and a half times the most of some 65 worlds of five machines and all faults
(62 plans in 600 node-seconds)."""
QUIET_PLANS = 6
"""For each demand, once all that can be served is. What still changes is that an exclusion ends: the run that serves is
compared with what there would be beside it and in its place; a gain is looked for again when it has lasted, and once
more when it serves. Three looks of two plans; a deployment that looked every five seconds would make sixteen.
Who was revoked does not count: it goes on alone, and its links come up and go down, each a change."""
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
    _expect(world, setting, "demands differ", CONVERGE_S, lambda: needs.undecided(world))
    _expect(world, setting, "two holders", SERVE_S, lambda: needs.shared(world))
    if not setting.aim:
        _expect(world, setting, "not served", SERVE_S, lambda: needs.unserved(world, alone_at))
    world.agenda.run(max(world.now, min(setting.until, alone_at + SERVE_S)))
    before = world.checks.plans_of_members
    world.agenda.run(setting.until)
    if world.checks.plans > PLANS_PER_S * world.node_seconds + QUIET_PLANS:
        world.checks.fail("restless", f"{world.checks.plans} plans in {world.node_seconds:.0f} node-seconds")
    since = world.checks.plans_of_members - before
    if since > QUIET_PLANS * max(1, len(world.wanted())):
        world.checks.fail("restless", f"{since} plans after all was served")
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
