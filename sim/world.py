"""The world: machines, ways, one agenda, the checkers, and a hash over everything that happened."""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.core.node.mediator import NODE_RULES, Mediator, NodeRules, Self
from meshnode.core.planning import Demand
from meshnode.core.planning.footprint import LayerFootprint, ModelFootprint
from meshnode.identity.ids import NodeId
from meshnode.wire.demand import DeploymentId
from sim.agenda import Agenda, stream
from sim.checks import Checks
from sim.invites import Invites
from sim.keys import Mint, SimulatedAuthority
from sim.machine import LAYERS, Clock, Machine
from sim.network import Network, Way
from sim.profiles import Profile
from sim.requests import Requests

MB = 1_000_000
LAYER_MB = 100
MEMORY_MB = 700
"""A machine holds five layers beside a stage's reserve: three are needed at least."""
TAIL = 12
"""Last events kept for the report of a failure."""

_PACK = struct.Struct("<d").pack


@dataclass
class Odds:
    """What the engine asks of the profile; all zero once the world is healed."""

    stage_failure: float = 0.0
    step_failure: float = 0.0


@dataclass
class World:
    """Everything that one seed makes."""

    seed: int
    profile: Profile
    rules: NodeRules = NODE_RULES

    def __post_init__(self) -> None:
        self.agenda = Agenda()
        self.mint = Mint(self.seed)
        self.network = Network(self.agenda, self._way)
        self.machines: dict[NodeId, Machine] = {}
        """By place: the node's id, but for a copy."""
        self.node_at: dict[NodeId, NodeId] = {}
        self.models: dict[str, ModelFootprint] = {}
        """By manifest."""
        self.doubled: set[NodeId] = set()
        """Nodes whose key spoke twice under one number, or from two machines."""
        self.copies: list[Machine] = []
        self.checks = Checks(self)
        self.invites = Invites(self)
        self.requests = Requests(self.checks)
        self.faults = Odds(self.profile.stage_failure, self.profile.step_failure)
        self.events = 0
        self._tail: deque[tuple[int, float, str, str]] = deque(maxlen=TAIL)
        self._digest = hashlib.sha256()
        self._deployments = 0
        self._removed_s = 0.0

    @property
    def now(self) -> float:
        """Seconds since the world began."""
        return self.agenda.now

    @property
    def node_seconds(self) -> float:
        """How long machines have been in this world, all of them together."""
        return sum(self.now - machine.since for machine in self.machines.values()) + self._removed_s

    @property
    def trace(self) -> str:
        """Hash of everything that happened so far."""
        return self._digest.hexdigest()[:16]

    def add(self, name: str, *, memory_mb: int = MEMORY_MB) -> Machine:
        """A machine that belongs to the mesh; not switched on yet."""
        random = stream(self.seed, "clock", name)
        ppm = self.profile.clock_ppm / 1e6
        clock = Clock(1.0 + random.uniform(-ppm, ppm), random.uniform(0.0, 1e5))
        authority: SimulatedAuthority = self.mint.member(name, lambda: self.now + clock.calendar_step_s)
        me = Self(name, "member", (f"{name}:8420",), memory_mb * MB, 0, cores=4, software="sim", llama="sim")
        return self._place(Machine(self, name, me, authority, clock))

    def copy(self, machine: Machine) -> Machine:
        """A second machine with a copy of the data directory of `machine`; not switched on yet."""
        name = f"{machine.name}-copy"
        me = replace(machine.me, addresses=(f"{name}:8420",))
        copied = Machine(self, name, me, machine.authority, Clock(1.0, 0.0))
        copied.at = NodeId(f"{machine.node}*")
        machine.keep_peers()
        copied.disk = replace(
            machine.disk,
            peers=dict(machine.disk.peers),
            files=set(machine.disk.files),
            cached=dict(machine.disk.cached),
        )
        self.doubled.add(machine.node)
        self.copies.append(copied)
        return self._place(copied)

    def _place(self, machine: Machine) -> Machine:
        self.machines[machine.at] = machine
        self.node_at[machine.at] = machine.node
        self.network.hosts[machine.at] = machine
        return machine

    def remove(self, machine: Machine) -> None:
        """Switched off for good."""
        machine.crash(power=True)
        machine.on = False
        del self.machines[machine.at]
        self._removed_s += self.now - machine.since

    def place_of(self, node: NodeId, addresses: tuple[str, ...]) -> NodeId:
        """Where a dial of `node` at these addresses ends: at its copy when that is what it named."""
        copied = next((copy for copy in self.copies if copy.node == node), None)
        return copied.at if copied is not None and addresses == copied.me.addresses else node

    def make_mediator(
        self, me: Self, authority: SimulatedAuthority, draw: Callable[[int], bytes], now: float
    ) -> Mediator:
        """The code under test."""
        return Mediator(me, authority, draw, now, self.rules)

    def serve(self, *machines: Machine) -> None:
        """Somebody asks this machine's node for the model; of several, each takes the same deployment for its own."""
        self._deployments += 1
        model = footprint()
        demand = Demand(
            DeploymentId(f"{self._deployments:016x}"),
            1,
            machines[0].node,
            model.manifest_digest,
            model.name,
            context=256,
            lanes=4,
        )
        self.models[model.manifest_digest] = model
        for machine in machines:
            machine.disk.files.add(model.manifest_digest)
            machine.hand(on.CacheChanged(machine.disk.told()))
            machine.hand(on.Demanded(demand, model, int(self.now)))

    def running(self) -> list[Machine]:
        """Machines whose node runs."""
        return [machine for machine in self.machines.values() if machine.mediator is not None]

    def members(self) -> list[Machine]:
        """Those of them that nobody revoked, without copies."""
        return [m for m in self.running() if m.node not in self.mint.revoked and m.at == m.node]

    def wanted(self) -> dict[str, Demand]:
        """What some member that runs takes for wanted, but what is known as unloaded anywhere."""
        registers = [machine.mediator.register.demands for machine in self.members() if machine.mediator is not None]
        found = {each.deployment: each for demands in registers for each in demands.wanted()}
        gone = {key for demands in registers for key, known in demands.known.items() if known.demand.removed}
        return {key: demand for key, demand in sorted(found.items()) if key not in gone}

    # --- the trace ----------------------------------------------------------------------------------------------

    def note(self, name: str, event: on.Event) -> None:
        """One event was handed to a mediator."""
        self.events += 1
        now, kind = self.agenda.now, type(event.message if type(event) is on.Received else event).__name__
        self._digest.update(_PACK(now) + f"{name}{kind}".encode())
        self._tail.append((self.events, now, name, kind))

    @property
    def tail(self) -> tuple[str, ...]:
        """The last events and faults, for the report of a failure."""
        return tuple(f"{event or '-'} {at:.6f} {name} {kind}" for event, at, name, kind in self._tail)

    def note_frame(self, name: str, frame: bytes) -> None:
        """One message arrived."""
        self._digest.update(_PACK(self.agenda.now) + name.encode() + frame)

    def note_fault(self, text: str) -> None:
        """The world did something to somebody."""
        self._digest.update(_PACK(self.agenda.now) + text.encode())
        self._tail.append((0, self.agenda.now, "", text))

    def unhandled(self, machine: Machine, effect: do.Effect) -> None:
        """An effect of which the simulator knows nothing is a gap in it."""
        self.checks.fail("simulator", f"{machine.name} ordered {type(effect).__name__}, which nobody here does")

    def _way(self, source: NodeId, target: NodeId) -> Way:
        one, two = self.machines[source].name, self.machines[target].name
        pair = "/".join(sorted((one, two)))
        quality = self.profile.quality(stream(self.seed, "pair", pair))
        return Way(quality, stream(self.seed, "link", one, two))


def footprint(layers: int = LAYERS, layer_mb: int = LAYER_MB, name: str = "model") -> ModelFootprint:
    """A model as the planner sees one."""
    return ModelFootprint(
        manifest_digest=hashlib.sha256(name.encode()).hexdigest(),
        name=name,
        architecture="llama",
        width=64,
        vocabulary=1000,
        context_trained=1024,
        layers=tuple(LayerFootprint(layer_mb * MB, 64) for _ in range(layers)),
        embedding_bytes=MB,
        output_bytes=MB,
        boundaries=tuple(range(1, layers)),
    )
