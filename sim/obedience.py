"""What nodes promise, obey and free, judged from outside: the rules of coordination.

broken word   a grant that was sent is on disk, and the terms come back after a restart
forged claim  what is granted was really claimed by the coordinator that it names
hasty         nothing is loaded before every participant of the run has granted
two drivers   a stage obeys the coordinator of its run alone, and no order of a lower term after a higher one was loaded
usurped       no run of a holder that this node hears from is given to another coordinator
fenced        no stage of a run loads, connects or goes on below the fence of its deployment
overbooked    what is really loaded never exceeds a machine's memory
abandoned     no stage lives longer than its lease
two heads     a deployment's requests go to one head at a time
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from meshnode.core.coordination.ledger import HeldRun
from meshnode.core.coordination.ledger import Word as Said
from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.identity.ids import NodeId, short
from meshnode.wire.fence import Fence
from meshnode.wire.messages import Abort, Claim, Commit, Connect, FenceOff, Grant, Prepare

if TYPE_CHECKING:
    from sim.machine import Machine
    from sim.world import World

HEARD_S = 1.0
"""A holder that was heard of so recently, over a link that both ends have, is there for anybody."""


@dataclass
class Word:
    """What a node promised, over all its lives, and what it does in this one."""

    granted: dict[str, int] = field(default_factory=dict)
    loaded: dict[str, int] = field(default_factory=dict)
    """Highest term of which a stage was loaded, by deployment."""
    fenced: dict[str, int] = field(default_factory=dict)
    serving: dict[str, Fence] = field(default_factory=dict)
    stopped: set[Fence] = field(default_factory=set)
    """Runs that the effects of the event at hand also stop: what they begin of these ends in the same breath."""
    held: list[HeldRun] = field(default_factory=list)
    """Before the event that is looked at."""


class Obedience:
    """The checkers of coordination."""

    def __init__(self, world: World, fail: Callable[[str, str], None]) -> None:
        self.world = world
        self._fail = fail
        self.words: dict[NodeId, Word] = {}
        self.claims: dict[Fence, Claim] = {}
        """Every claim that a coordinator really made."""
        self.granted: set[tuple[NodeId, Fence]] = set()
        self.cut_overs = 0

    def started(self, machine: Machine) -> None:
        """A node came up: its terms must be back."""
        word = self.words.setdefault(machine.at, Word())
        word.loaded.clear()
        word.serving.clear()
        word.held = []
        assert machine.mediator is not None
        promised = machine.mediator.ledger.promised
        for deployment, term in word.granted.items():
            if promised.get(deployment, 0) < term:
                self._fail("broken word", f"{machine.name} granted term {term} and knows {promised} after a restart")

    def obeys(self, machine: Machine, effect: do.Effect) -> None:
        """Before every effect is carried out."""
        match effect:
            case do.Send():
                if isinstance(effect.message, Claim):
                    self.claims[effect.message.fence] = effect.message
                elif isinstance(effect.message, Grant):
                    self._grants(machine, effect.peer, effect.message)
            case do.PrepareStage(order=order):
                self._loads(machine, order)
            case do.ConnectStages(fence=fence):
                self._goes_on(machine, fence)
            case do.ServeHead(fence=fence):
                self._serves(machine, fence)
            case do.DrainHead(fence=fence) | do.CloseHead(fence=fence):
                serving = self.words[machine.at].serving
                for deployment in [key for key, each in serving.items() if each == fence]:
                    del serving[deployment]
            case _:
                pass

    def handled(self, machine: Machine, event: on.Event, effects: list[do.Effect]) -> None:
        """After every event of every node."""
        mediator = machine.mediator
        assert mediator is not None
        word = self.words[machine.at]
        if effects and isinstance(event, on.Received):
            self._ordered(machine, event, effects)
        if effects or word.stopped:
            word.stopped = {effect.fence for effect in effects if isinstance(effect, do.StopStages)}
        word.held = list(mediator.ledger.held.values())
        for run in word.held:
            if machine.last_local >= run.until:
                self._fail("abandoned", f"{machine.name} holds {run.claim.fence} beyond its lease")

    # --- promises ---------------------------------------------------------------------------------------------------

    def _grants(self, machine: Machine, peer: NodeId, grant: Grant) -> None:
        disk = msgspec.msgpack.decode(machine.disk.ledger, type=dict[str, Said]) if machine.disk.ledger else {}
        if disk.get(grant.deployment, Said()).promised < grant.fence.term:
            self._fail("broken word", f"{machine.name} grants {grant.fence} before it is on disk")
        word = self.words[machine.at]
        word.granted[grant.deployment] = max(word.granted.get(grant.deployment, 0), grant.fence.term)
        self.granted.add((machine.node, grant.fence))
        claim = self.claims.get(grant.fence)
        if claim is None or claim.coordinator != peer:
            self._fail("forged claim", f"{machine.name} grants {grant.fence}, which {short(peer)} never claimed")

    def _usurped(self, machine: Machine, new: Fence, deployment: str, coordinator: NodeId) -> None:
        assert machine.mediator is not None
        for run in self.words[machine.at].held:
            holder = run.claim.coordinator
            if run.claim.fence == new or run.claim.deployment != deployment or holder == coordinator:
                continue
            if machine.last_local < run.until and self._hears(machine, holder):
                self._fail("usurped", f"{machine.name} gives {deployment} of {short(holder)} to {short(coordinator)}")

    def _hears(self, machine: Machine, other: NodeId) -> bool:
        """Whether `other` is there for `machine` beyond doubt."""
        if other == machine.node:
            return True
        assert machine.mediator is not None
        link = machine.mediator.links.links.get(other)
        return link is not None and link.up and machine.last_local - link.heard_at < HEARD_S

    # --- stages -----------------------------------------------------------------------------------------------------

    def _ordered(self, machine: Machine, event: on.Received, effects: list[do.Effect]) -> None:
        """Stages start and stop at the word of their own coordinator."""
        message, peer = event.message, event.peer
        if isinstance(message, Claim) and any(
            isinstance(effect, do.Send) and isinstance(effect.message, Grant) and effect.message.fence == message.fence
            for effect in effects
        ):
            self._usurped(machine, message.fence, message.deployment, message.coordinator)
        if not isinstance(message, Connect | Commit | Abort | FenceOff):
            return
        for effect in effects:
            if not isinstance(effect, do.StopStages | do.ConnectStages):
                continue
            claim = self.claims.get(effect.fence)
            by_word = effect.fence == message.fence or isinstance(message, FenceOff)
            if by_word and claim is not None and claim.coordinator != peer and not self._succeeds(claim, event):
                kind = type(message).__name__
                self._fail("two drivers", f"{machine.name} obeys a {kind} of {short(peer)} for {effect.fence}")

    def _succeeds(self, old: Claim, event: on.Received) -> bool:
        """A fence of the coordinator whose run serves now ends the runs of others too."""
        new = self.claims.get(event.message.fence) if isinstance(event.message, FenceOff) else None
        return new is not None and new.deployment == old.deployment and new.coordinator == event.peer

    def _loads(self, machine: Machine, order: Prepare) -> None:
        fence, deployment = order.fence, order.deployment
        assert machine.mediator is not None
        word, held = self.words[machine.at], machine.mediator.ledger.held.get(fence)
        if held is None:
            if fence not in word.stopped:
                self._fail("two drivers", f"{machine.name} obeys {fence}, which it does not hold")
            return
        if fence.term < word.granted.get(deployment, 0) or fence.term < word.loaded.get(deployment, 0):
            self._fail("two drivers", f"{machine.name} obeys term {fence.term} after a higher one")
        word.loaded[deployment] = fence.term
        for stage in held.claim.stages:
            granted = stage.node in (held.claim.coordinator, machine.node) or (stage.node, fence) in self.granted
            if not granted:
                self._fail("hasty", f"{machine.name} loads {fence}, which {short(stage.node)} did not grant")
        self._goes_on(machine, fence)
        if not order.hold:
            self._fits(machine, fence)

    def _goes_on(self, machine: Machine, fence: Fence) -> None:
        assert machine.mediator is not None
        held = machine.mediator.ledger.held.get(fence)
        if held is None:
            return
        said = machine.mediator.ledger.words.get(held.claim.deployment, Said())
        fenced = self.words[machine.at].fenced
        fenced[held.claim.deployment] = max(fenced.get(held.claim.deployment, 0), said.fenced)
        if fence.term <= fenced[held.claim.deployment]:
            self._fail("fenced", f"{machine.name} obeys {fence} at or below its fence")

    def _fits(self, machine: Machine, new: Fence) -> None:
        """By what was claimed for the stages that really are there, not by the ledger's own sum."""
        engine = machine.engine
        present = {(fence, stage) for fence, stages in engine.stages.items() for stage in stages}
        present -= engine.fetching
        kept = {place[0] for place in engine.kept}
        total = 0
        held = machine.mediator.ledger.held if machine.mediator is not None else {}
        for fence, run in held.items():
            for stage in run.own(machine.node):
                if (fence, stage.stage) in present or fence == new or fence in kept:
                    total += stage.reserved_bytes
        if total > machine.me.memory_usable:
            self._fail("overbooked", f"{machine.name} loads {total} bytes, {machine.me.memory_usable} are there")

    # --- heads ------------------------------------------------------------------------------------------------------

    def _serves(self, machine: Machine, fence: Fence) -> None:
        assert machine.mediator is not None
        found = machine.mediator.coordinator.of(fence)
        if found is None:
            return
        deployment, serving = found[0].demand.deployment, self.words[machine.at].serving
        before = serving.get(deployment)
        self.cut_overs += before is not None and before != fence
        serving[deployment] = fence

    def orphans(self) -> list[str]:
        """Runs that a participant still holds although their coordinator does not know them."""
        found = []
        for machine in self.world.members():
            assert machine.mediator is not None
            for fence, run in machine.mediator.ledger.held.items():
                coordinator = self.world.machines[run.claim.coordinator].mediator
                if coordinator is None or not coordinator.coordinates(fence):
                    found.append(f"{machine.name} still holds {fence}")
        return found
