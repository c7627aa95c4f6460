"""What goes wrong, when, and how it is made good again: everything drawn from the seed before it happens.

Every fault ends by itself or with `heal`; after that the world is a quiet one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from meshnode.core.node import events as on
from meshnode.identity.ids import NodeId
from sim.agenda import stream
from sim.machine import DISK_S

if TYPE_CHECKING:
    from sim.machine import Machine
    from sim.world import World

REVOKING_NODES = 5
"""Below, too few are left for the model; for the same reason a node is revoked or copied, not one of each."""
RACES = 2
"""Invites of one world: the mesh grows by four machines at most."""
LEAVE_S = 0.5
"""Between a goodbye and the end of the process."""


class Faults:
    """The misfortunes of one world."""

    def __init__(self, world: World, until: float) -> None:
        self.world, self.until = world, until
        self.random: Random = stream(world.seed, "faults")
        self._first = list(world.machines.values())
        """Those that were there at the beginning: the issuer, ... , who is asked for the model."""
        self._blocked: list[tuple[NodeId, NodeId]] = []
        self._acts: dict[str, Callable[[], None]] = {
            "crash": lambda: self._crash(power=False),
            "power_off": lambda: self._crash(power=True),
            "pause": self._pause,
            "leave": self._leave,
            "partition": self._partition,
            "one_way": self._one_way,
            "clog": self._clog,
            "reset": self._reset,
            "half_close": self._half_close,
            "stall": self._stall,
            "slow_disk": self._slow_disk,
            "full_disk": self._full_disk,
            "calendar": self._calendar,
            "revoke": self._revoke,
            "drain": self._drain,
            "invite": self._invite,
            "copy": self._copy,
            "unload": self._unload,
        }

    def begin(self) -> None:
        """Draw when each kind strikes."""
        for kind, per_minute in self.world.profile.faults:
            random = stream(self.world.seed, "strikes", kind)
            at = random.expovariate(per_minute / 60)
            while at < self.until:
                self.world.agenda.at(at, self._strike(kind))
                at += random.expovariate(per_minute / 60)

    def heal(self) -> None:
        """Everything works from now on: every machine is up, every way is free, nothing fails any more."""
        world = self.world
        world.note_fault("heal")
        world.faults.stage_failure = world.faults.step_failure = 0.0
        for source, target in self._blocked:
            world.network.unblock(source, target)
        self._blocked.clear()
        world.invites.aims = False
        for machine in world.machines.values():
            machine.disk.write_s, machine.disk.full = DISK_S, False
            machine.clock.calendar_step_s = 0.0
            machine.resume()
            if machine.mediator is not None and machine.mediator.stopping:
                machine.crash(power=False)
            if machine.mediator is None:
                machine.start()
            machine.hand(on.DrainWanted(machine.node, draining=False))
        self._say_revoked(next(iter(world.machines.values())))

    def _strike(self, kind: str) -> Callable[[], None]:
        def act() -> None:
            if self.world.now < self.until:
                self._acts[kind]()

        return act

    def _one(self, *, running: bool = True) -> Machine | None:
        machines = self.world.running() if running else list(self.world.machines.values())
        return self.random.choice(machines) if machines else None

    def _later(self, delay: float, act: Callable[[], None]) -> None:
        """Before the heal, or never: `heal` makes everything good by itself."""
        self.world.agenda.after(delay, lambda: act() if self.world.now < self.until else None)

    def _crash(self, *, power: bool) -> None:
        machine = self._one()
        if machine is None or len(self.world.running()) <= 2:
            return
        self.world.note_fault(f"{machine.name} {'loses power' if power else 'crashes'}")
        machine.crash(power=power)
        self._later(self.random.choice((0.2, 2.0, 8.0, 20.0)), lambda: self._start(machine))

    def _start(self, machine: Machine) -> None:
        if machine.mediator is None:
            self.world.note_fault(f"{machine.name} starts")
            machine.start()

    def _leave(self) -> None:
        machine = self._one()
        if machine is None or machine.paused or len(self.world.running()) <= 2:
            return
        self.world.note_fault(f"{machine.name} leaves")
        machine.hand(on.Stopping())
        machine.after(LEAVE_S, lambda: machine.crash(power=False))
        self._later(5.0 + self.random.random() * 5.0, lambda: self._start(machine))

    def _drain(self) -> None:
        """Somebody wants a machine to take no work for a while: what it does moves elsewhere, if there is room."""
        machine = self._one()
        assert machine is not None
        self.world.note_fault(f"{machine.name} is to be spared")
        machine.hand(on.DrainWanted(machine.node))
        self._later(
            5.0 + self.random.random() * 10.0, lambda: machine.hand(on.DrainWanted(machine.node, draining=False))
        )

    def _pause(self) -> None:
        machine = self._one()
        if machine is not None:
            self.world.note_fault(f"{machine.name} stands still")
            machine.pause()
            self._later(self.random.choice((0.3, 1.0, 4.0, 12.0)), machine.resume)

    def _partition(self) -> None:
        nodes = list(self.world.machines)
        self.random.shuffle(nodes)
        cut = self.random.randint(1, max(1, len(nodes) // 2))
        self.world.note_fault(f"partition of {cut}")
        pairs = [pair for a in nodes[:cut] for b in nodes[cut:] for pair in ((a, b), (b, a))]
        self._block(pairs, self.random.uniform(0.5, 20.0))

    def _one_way(self) -> None:
        nodes = list(self.world.machines)
        source, target = self.random.sample(nodes, 2)
        self.world.note_fault("a way is lost in one direction")
        self._block([(source, target)], self.random.uniform(0.5, 20.0))

    def _clog(self) -> None:
        """Swizzle-clog: stop ways of one machine one by one, release them in another order."""
        machine = self._one(running=False)
        assert machine is not None
        self.world.note_fault(f"{machine.name} clogs")
        others = [node for node in self.world.machines if node != machine.node and self.random.random() < 0.7]
        for node in others:
            pairs = [(machine.node, node), (node, machine.node)]
            seconds = self.random.uniform(1, 10)
            self._later(self.random.uniform(0, 3), partial(self._block, pairs, seconds))

    def _block(self, pairs: list[tuple[NodeId, NodeId]], seconds: float) -> None:
        for source, target in pairs:
            self.world.network.block(source, target)
        self._blocked.extend(pairs)
        self._later(seconds, lambda: self._free(pairs))

    def _free(self, pairs: list[tuple[NodeId, NodeId]]) -> None:
        for pair in pairs:
            self._blocked.remove(pair)
            self.world.network.unblock(*pair)

    def _reset(self) -> None:
        ends = self.world.network.ends()
        if ends:
            self.world.network.reset(self.random.choice(ends))

    def _half_close(self) -> None:
        """One side is told that the stream is over, the other learns it when it writes."""
        ends = self.world.network.ends()
        if ends:
            end = self.random.choice(ends)
            self.world.network.abort(end)
            self.world.machines[end.owner].ended(end, "closed")

    def _stall(self) -> None:
        ends = self.world.network.ends()
        if ends:
            self.world.network.stall(self.random.choice(ends), self.random.uniform(0.5, 12.0))

    def _slow_disk(self) -> None:
        machine = self._one(running=False)
        assert machine is not None
        self.world.note_fault(f"{machine.name} has a slow disk")
        machine.disk.write_s = self.random.uniform(0.2, 3.0)
        self._later(10.0, lambda: self._good_disk(machine))

    def _full_disk(self) -> None:
        machine = self._one(running=False)
        assert machine is not None
        self.world.note_fault(f"{machine.name} has a full disk")
        machine.disk.full = True
        self._later(5.0, lambda: self._good_disk(machine))

    @staticmethod
    def _good_disk(machine: Machine) -> None:
        machine.disk.write_s, machine.disk.full = DISK_S, False

    def _revoke(self) -> None:
        """The first machine is the issuer; the last one serves, and stays."""
        issuer = self._first[0]
        if not self._can_spare() or issuer.mediator is None or issuer.disk.full:
            return
        victim = self.random.choice(self._first[1:-1])
        self.world.note_fault(f"{victim.name} is revoked")
        self.world.mint.revoke([victim.node])
        self._say_revoked(issuer)

    def _say_revoked(self, issuer: Machine) -> None:
        """What a person does at the issuer, until it is done: the node may crash in the middle."""
        record = self.world.mint.last_list
        if record is None or issuer.mediator is None:
            return
        if record not in issuer.mediator.membership.revocations.records.values():
            issuer.hand(on.Revoked(record))

    def _can_spare(self) -> bool:
        return len(self._first) >= REVOKING_NODES and not self.world.mint.revoked and not self.world.copies

    def _invite(self) -> None:
        """More machines paste an invite than it admits."""
        issuer = self._first[0]
        if len(self.world.invites.races) >= RACES or issuer.mediator is None or issuer.disk.full:
            return
        uses = self.random.choice((1, 1, 2))
        self.world.note_fault("an invite is raced for")
        self.world.invites.invite(issuer, uses, uses + self.random.choice((1, 2)))

    def _copy(self) -> None:
        """Somebody copies a data directory to another machine and starts it there. Who lies has its own two voices."""
        candidates = self._first[1 + self.world.profile.liars : -1]
        if not self._can_spare() or not candidates:
            return
        victim = self.random.choice(candidates)
        if not victim.disk.incarnation:
            return
        self.world.note_fault(f"{victim.name} is copied")
        self.world.copy(victim).start()

    def _unload(self) -> None:
        """Somebody wants the model no more, at any machine, and a little later asks for it anew."""
        machine, wanted = self._one(), list(self.world.wanted())
        if machine is None or machine.disk.full or not wanted:
            return
        self.world.note_fault(f"{machine.name} unloads")
        machine.hand(on.Withdrawn(self.random.choice(wanted), int(self.world.now)))
        self._later(self.random.uniform(1.0, 8.0), lambda: self.world.serve(self.random.choice(self.world.running())))

    def remove_copies(self) -> None:
        """A person switches the copies off, and restarts the nodes whose key they had."""
        for copy in self.world.copies:
            original = self.world.machines[copy.node]
            self.world.note_fault(f"{copy.name} is switched off")
            self.world.remove(copy)
            original.crash(power=False)
            original.start()
        self.world.copies.clear()
        self.world.checks.noticed.clear()

    def _calendar(self) -> None:
        """A calendar is set: certificates allow a day, so that half an hour must change nothing."""
        machine = self._one(running=False)
        assert machine is not None
        machine.clock.calendar_step_s = self.random.uniform(-1800.0, 1800.0)
