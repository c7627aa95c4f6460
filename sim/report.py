"""What the design promises of membership, measured: `python -m sim report` prints the table that the docs quote."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from meshnode.core.membership.roster import Entry
from meshnode.core.node import events as on
from meshnode.core.node.mediator import NODE_RULES, NodeRules
from meshnode.identity.ids import NodeId
from sim.agenda import stream
from sim.checks import Violation
from sim.engine import LOAD_S
from sim.liar import EVERY_S, FORGED, Liar
from sim.machine import Machine
from sim.profiles import CALM, PROFILES
from sim.rates import compare
from sim.trial import Setting, populate, run
from sim.world import MEMORY_MB, World, footprint

SETTLE_S = 30.0
"""Until a fresh mesh of any size is quiet."""
SEED = 1
WORLD_S = 5000.0
"""A long measurement is split into worlds of about this length: other seeds give other keys, rings and links."""


TAKEOVER_NODES = 4
"""Beside the coordinator: one more than the model needs."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    bar: str
    measured: str
    good: bool
    wall_s: float = 0.0
    """What the measurement took."""


def quiet(nodes: int, loss: float, seed: int = SEED) -> World:
    """A mesh on links of 20 ms without faults, settled."""
    world = World(seed, replace(CALM, loss=loss))
    populate(world, nodes)
    world.agenda.run(SETTLE_S + nodes / 16)
    return world


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of all lie."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def spread(world: World, author: Machine, within: float) -> list[float]:
    """Seconds from a change at `author` until each other node held it; endless where it never came."""
    arrived: dict[NodeId, float] = {}
    before = author.authority.announced

    def heard(machine: Machine, node: NodeId, entry: Entry) -> None:
        if node == author.node and entry.body.number > before:
            arrived.setdefault(machine.node, world.now)

    world.checks.heard = heard
    author.hand(on.CacheChanged({f"{author.authority.announced[1]:064x}": ((0, 1),)}))
    began = world.now
    world.agenda.run(began + within)
    world.checks.heard = None
    return [arrived.get(machine.node, float("inf")) - began for machine in world.running() if machine is not author]


def convergence(world: World, updates: int) -> list[float]:
    """Seconds until everybody held an update, one for each update."""
    random = stream(SEED, "authors")
    return [max(spread(world, random.choice(world.running()), 12.0)) for _ in range(updates)]


def detection(world: World, deaths: int) -> list[float]:
    """Seconds from a power-off until each other node took the machine for dead."""
    random = stream(SEED, "deaths")
    found: list[float] = []
    for _ in range(deaths):
        victim = random.choice(world.running())
        victim.crash(power=True)
        began = world.now
        seen: dict[NodeId, float] = {}
        while world.now < began + 30.0 and len(seen) < len(world.running()):
            world.agenda.run(world.now + 0.05)
            for machine in world.running():
                assert machine.mediator is not None
                entry = machine.mediator.roster.entries.get(victim.node)
                if machine.node not in seen and (entry is None or not entry.present):
                    seen[machine.node] = world.now - began
        found += [seen.get(machine.node, float("inf")) for machine in world.running()]
        victim.start()
        world.agenda.run(world.now + 15.0)
    return found


def false_deaths(nodes: int, seconds: float, loss: float, pause_s: float = 0.0, seed: int = SEED) -> int:
    """How often a node that lives was taken for gone."""
    world = quiet(nodes, loss, seed)
    wrong: list[str] = []

    def heard(machine: Machine, node: NodeId, entry: Entry) -> None:
        if not entry.present:
            wrong.append(f"{world.now:.3f} {machine.name} {entry.body.name}")

    world.checks.heard = heard
    end = world.now + seconds
    index = 0
    while world.now < end:
        if pause_s:
            machine = world.running()[index % nodes]
            machine.pause()
            world.agenda.run(world.now + pause_s)
            machine.resume()
            index += 1
        world.agenda.run(min(end, world.now + 5.0))
    return len(wrong)


def traffic(world: World, seconds: float) -> float:
    """Bytes a second that one node sends while nothing happens, TLS records and packet headers included."""
    nodes = len(world.machines)
    before = sum(world.network.sent_bytes.values())
    world.agenda.run(world.now + seconds)
    return (sum(world.network.sent_bytes.values()) - before) / nodes / seconds


def healing(nodes: int, loss: float) -> float:
    """Seconds from the end of a partition of a minute, with changes on both sides, until all rosters are equal."""
    world = quiet(nodes, loss)
    machines = list(world.machines.values())
    half = [machine.node for machine in machines[: nodes // 2]]
    rest = [machine.node for machine in machines[nodes // 2 :]]
    pairs = [pair for a in half for b in rest for pair in ((a, b), (b, a))]
    for pair in pairs:
        world.network.block(*pair)
    world.agenda.run(world.now + 30.0)
    for machine in (machines[0], machines[-1]):
        machine.hand(on.CacheChanged({"0" * 64: ((0, 2),)}))
    world.agenda.run(world.now + 30.0)
    for pair in pairs:
        world.network.unblock(*pair)
    healed = world.now
    while world.checks.differences() and world.now < healed + 60.0:
        world.agenda.run(world.now + 0.1)
    return world.now - healed if not world.checks.differences() else float("inf")


def forgeries(wanted: int, rules: NodeRules = NODE_RULES) -> tuple[int, int]:
    """Forgeries sent, forgeries believed; the checkers end a world at the first that is."""
    told = believed = 0
    seed = SEED
    while told < wanted:
        world = World(seed, replace(PROFILES["lan"], faults=()), rules)
        populate(world, 5)
        machines = list(world.machines.values())
        liars = [Liar(world, machine, 600.0, EVERY_S / 40, FORGED) for machine in machines[1:3]]
        for liar in liars:
            liar.begin()
        try:
            world.agenda.run(120.0)
        except Violation:
            believed += 1
        told += sum(sum(liar.told.values()) for liar in liars)
        seed += 1
    return told, believed


def speed(profile: str) -> float:
    """Node-seconds that a second of one core simulates at 20 nodes, from an empty world to its end."""
    setting = Setting(SEED, 20, profile, 120.0)
    began = time.process_time()
    outcome = run(setting)
    took = time.process_time() - began
    return outcome.node_seconds / took if outcome.good else 0.0


def _spread_row(world: World, bar: float, updates: int) -> Row:
    times = convergence(world, updates)
    worst = percentile(times, 0.99)
    nodes, loss = len(world.machines), world.profile.loss
    what = f"all of {nodes} nodes hold an update, 20 ms links, {loss:.0%} loss, p99 of {updates} updates"
    return Row(what, f"{bar:g} s", f"{worst:.2f} s (median {percentile(times, 0.5):.2f})", worst <= bar)


def _detection_row(world: World, deaths: int) -> Row:
    times = detection(world, deaths)
    worst = percentile(times, 0.99)
    return Row(f"power-off known to all of {len(world.machines)} nodes, p99", "10 s", f"{worst:.2f} s", worst <= 10.0)


def _traffic_row(world: World, bar: float) -> Row:
    sent = traffic(world, 30.0)
    what = f"idle traffic at {len(world.machines)} nodes, a node and direction"
    return Row(what, f"{bar:g} KB/s", f"{sent / 1000:.2f} KB/s", sent <= bar * 1000)


def _false_row(nodes: int, seconds: float, loss: float, pause_s: float = 0.0) -> Row:
    worlds = max(1, round(seconds / WORLD_S))
    wrong = sum(false_deaths(nodes, seconds / worlds, loss, pause_s, SEED + index) for index in range(worlds))
    story = f", a node pauses {pause_s:g} s every 5 s" if pause_s else ""
    what = f"alive nodes taken for dead in {nodes * seconds:,.0f} node-seconds of {nodes} nodes, {loss:.0%} loss{story}"
    return Row(what, "0", str(wrong), wrong == 0)


def _healing_row(nodes: int) -> Row:
    seconds = healing(nodes, 0.0)
    what = f"rosters of {nodes} nodes equal after a partition of 60 s"
    return Row(what, "10 s", f"{seconds:.1f} s", seconds <= 10.0)


def _forgery_row(count: int) -> Row:
    told, believed = forgeries(count)
    return Row(
        f"forged, replayed, foreign, minted, bit-flipped: believed of {told:,}", "0", str(believed), believed == 0
    )


def _speed_row(profile: str) -> Row:
    found = speed(profile)
    return Row(f"node-seconds in a second of one core, 20 nodes, {profile}", "1,000", f"{found:,.0f}", found >= 1000.0)


def _planning_row(inventories: int, error: float) -> Row:
    found = [compare(SEED + index, error) for index in range(inventories)]
    worst, best = min(each.ratio for each in found), max(each.ratio for each in found)
    split = sum(each.nodes > 1 for each in found)
    what = f"tokens/s of the plan to the best single machine's, {inventories} inventories, speeds off by {error:.0%}"
    return Row(what, "0.97", f"{worst:.3f} at worst, {best:.2f} at best ({split} splits)", worst >= 0.97)


def _of_one_world(nodes: int, bars: tuple[float, float], updates: int, deaths: int) -> Iterator[Row]:
    """Idle traffic, spreading and detection, one after the other: to make a large mesh takes longest."""
    idle_kb, spread_s = bars
    world = quiet(nodes, 0.05)
    yield _traffic_row(world, idle_kb)
    yield _spread_row(world, spread_s, updates)
    yield _detection_row(world, deaths)


def takeover(seed: int, *, adopts: bool) -> float:
    """Seconds from the power-off of a coordinator until another one's run serves; endless where none does.

    `adopts`: it has no stage itself, so that all slices stay loaded; else a third of the layers is loaded anew, from
    disks that have them.
    """
    world = World(seed, replace(CALM, loss=0.01))
    populate(world, TAKEOVER_NODES)
    first = world.add("coordinator", memory_mb=50 if adopts else MEMORY_MB)
    first.disk.peers.update(next(iter(world.machines.values())).disk.peers)
    first.disk.peers[next(iter(world.machines))] = ("n0:8420",)
    world.agenda.at(0.5, first.start)
    world.agenda.run(5.0)
    if not adopts:
        for machine in world.running():
            machine.disk.files.add(footprint().manifest_digest)
            machine.hand(on.CacheChanged(machine.disk.told()))
            machine.hand(on.DrainWanted(machine.node, draining=machine.name in ("n0", "n1")))
    world.serve(first)
    world.agenda.run(15.0 + seed % 50 / 10)
    for machine in world.running():
        machine.hand(on.DrainWanted(machine.node, draining=False))
    first.crash(power=True)
    began = world.now
    while world.now < began + 60.0:
        world.agenda.run(world.now + 0.02)
        if any(machine.engine.serving for machine in world.running()):
            return world.now - began
    return float("inf")


def _takeover_row(worlds: int, *, adopts: bool) -> Row:
    times = [takeover(seed, adopts=adopts) for seed in range(1, worlds + 1)]
    what = "every slice stays loaded" if adopts else "a part is loaded anew, 0.3 to 0.6 s"
    bar = 6.0 if adopts else 6.0 + 2 * LOAD_S
    p50, p99 = percentile(times, 0.5), percentile(times, 0.99)
    measured = f"p50 {p50:.1f} s, p99 {p99:.1f} s of {worlds}"
    return Row(f"take-over after the coordinator's power-off, {what}", f"p99 {bar:.1f} s", measured, p99 <= bar)


def measurements(*, long: bool) -> dict[str, Iterator[Row]]:
    """What to measure, by name; `long` as often as the bars ask for. Nothing runs before its rows are asked for."""

    def each(*rows: Callable[[], Row]) -> Iterator[Row]:
        return (row() for row in rows)

    return {
        "speed": each(*(lambda profile=profile: _speed_row(profile) for profile in ("lan", "wan", "hostile"))),
        "8": _of_one_world(8, (2.0, 1.5), 100, 10),
        "32": _of_one_world(32, (10.0, 2.0), 100 if long else 30, 5),
        "healing": each(lambda: _healing_row(8), lambda: _healing_row(32)),
        "deaths": each(
            lambda: _false_row(8, 62_500.0 if long else 2000.0, 0.05),
            lambda: _false_row(20, 25_000.0 if long else 500.0, 0.05),
            lambda: _false_row(8, 1000.0, 0.0, 1.0),
        ),
        "planning": each(lambda: _planning_row(200 if long else 20, 0.03)),
        "takeover": each(
            lambda: _takeover_row(500 if long else 100, adopts=True),
            lambda: _takeover_row(500 if long else 100, adopts=False),
        ),
        "lies": each(lambda: _forgery_row(100_000 if long else 5_000)),
        "256": _of_one_world(256, (10.0, 3.0), 20 if long else 6, 3 if long else 1),
        "256-lossy": each(lambda: _spread_row(quiet(256, 0.20), 5.0, 20 if long else 6)),
    }


LARGE = ("256", "256-lossy")
"""Left out of a small report: minutes each."""


def timed(rows: Iterator[Row]) -> Iterator[Row]:
    """Each row with the seconds until it was there."""
    while True:
        began = time.perf_counter()
        row = next(rows, None)
        if row is None:
            return
        yield replace(row, wall_s=time.perf_counter() - began)


def table(measured: list[Row]) -> str:
    """As Markdown, for the docs."""
    head = ("measured by the simulator", "bar", "measured", "took", "")
    lines = [head, *((r.what, r.bar, r.measured, f"{r.wall_s:.0f} s", "" if r.good else "MISSED") for r in measured)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    texts = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([texts[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *texts[1:]])
