"""What must hold at every step, judged from outside the code under test.

forged        an applied announcement was really signed by the member it names, and is exactly that record
rolled back   no node ever holds an older number of an author than it held before
unbounded     queues, rosters, frames and effects of one event have limits
spinning      time passes: a node does not handle events for ever at one instant
revoked       who knows of a revocation has no link to that peer and makes no plan with it
restless      no node plans for a deployment without pause, or again what gave no plan; all together make few plans
framed        nobody is barred but by the issuer
invite        an invite admits as many keys as it says, each on disk before it is signed
copied        a key on two machines is noticed by all and kept out of plans; where there is none nobody is suspected

The rules of coordination are in `obedience`.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from meshnode.core.coordination.demands import Known
from meshnode.core.membership.announcement import Body
from meshnode.core.membership.roster import Entry
from meshnode.core.node import effects as do
from meshnode.core.node import events as on
from meshnode.core.planning import Demand, Inventory
from meshnode.identity.domains import Domain
from meshnode.identity.ids import NodeId, short
from meshnode.identity.invite_book import InviteEntry, decode_book
from meshnode.wire.limits import CONTROL_FRAME
from meshnode.wire.messages import Buckets, Have, Holding, Ping, Pong, Probe, Probed, Revoke, Summary, Want
from sim.obedience import Obedience

if TYPE_CHECKING:
    from sim.machine import Machine
    from sim.world import World

EFFECTS = 2048
"""Of one event: a whole roster of 512 to a new link, twice over, and room."""
ROSTER = 512
INSTANT = 2000
"""Events of one node at one instant; a link that carries a whole roster brings 1024."""


PLANS = 12
PLANS_S = 1.0
"""Of one deployment: changes settle for 0.2 s, and each may ask twice, without and with those that failed."""
SAYS_NOTHING = frozenset({Ping, Pong, Have, Want, Summary, Buckets, Holding, Probe, Probed})
"""Messages that can change no roster; what else happened along with them is looked at with the next event."""


class Violation(Exception):
    """A rule was broken; the first one ends the run."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule, self.detail = rule, detail


@dataclass
class Life:
    """What the checkers remember of one node while it lives."""

    planned: defaultdict[str, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=PLANS)))
    asked: dict[str, tuple[int, Demand, Inventory]] = field(default_factory=dict)
    """What the last plan of each deployment was to be made of, and the term before it."""
    numbers: dict[NodeId, tuple[int, int]] = field(default_factory=dict)
    entries: dict[NodeId, object] = field(default_factory=dict)
    present: list[Entry] = field(default_factory=list)
    lists: list[Revoke] = field(default_factory=list)
    demands: dict[str, Known] = field(default_factory=dict)
    instant: float = -1.0
    at_instant: int = 0


class Checks:
    """All checkers of one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.lives: dict[NodeId, Life] = {}
        self.obedience = Obedience(world, self.fail)
        self.signed: dict[bytes, set[bytes]] = {}
        """Keys that got a certificate, by invite."""
        self.noticed: set[NodeId] = set()
        """Nodes of which everybody knows that their key runs twice."""
        self.linked_at: dict[NodeId, float] = {}
        """Since when a copy and its original both have links."""
        self.applied = self.plans = self.plans_of_members = 0
        self.judged: dict[tuple[NodeId, bytes, bytes], Body | None] = {}
        self.heard: Callable[[Machine, NodeId, Entry], None] | None = None
        """Told of every entry that a roster takes up or changes: how the report measures."""

    def fail(self, rule: str, detail: str) -> None:
        """End the run."""
        raise Violation(rule, detail)

    # --- lives --------------------------------------------------------------------------------------------------

    def started(self, machine: Machine) -> None:
        """A node came up: its terms must be back."""
        self.lives[machine.at] = Life()
        self.obedience.started(machine)

    # --- steps --------------------------------------------------------------------------------------------------

    def handled(self, machine: Machine, event: on.Event, effects: list[do.Effect]) -> None:
        """After every event of every node."""
        life = self.lives[machine.at]
        now = self.world.agenda.now
        if life.instant == now:
            life.at_instant += 1
            if life.at_instant > INSTANT:
                self.fail("spinning", f"{machine.name} handles {type(event).__name__} for ever")
        else:
            life.instant, life.at_instant = now, 1
        if len(effects) > EFFECTS:
            self.fail("unbounded", f"{len(effects)} effects of one {type(event).__name__} at {machine.name}")
        self._barred(machine, life)
        self._suspected(machine)
        self._demands(machine, life)
        self.obedience.handled(machine, event, effects)
        if not (type(event) is on.Received and type(event.message) in SAYS_NOTHING):
            self._roster(machine, life)

    def obeys(self, machine: Machine, effect: do.Effect) -> None:
        """Before every effect is carried out."""
        self.obedience.obeys(machine, effect)
        if isinstance(effect, do.MakePlan):
            self._planned(machine, effect)

    def _barred(self, machine: Machine, life: Life) -> None:
        assert machine.mediator is not None
        revocations = machine.mediator.membership.revocations
        lists = list(revocations.records.values())
        if lists == life.lists:  # the same objects, compared without a line of Python
            return
        life.lists = lists
        revoked = self.world.mint.revoked
        for node in self.world.machines:
            if revocations.bars(node) and node not in revoked:
                self.fail("framed", f"{machine.name} bars {short(node)}, which no issuer revoked")

    def _suspected(self, machine: Machine) -> None:
        """Nobody is taken for a copy without one."""
        assert machine.mediator is not None
        membership = machine.mediator.membership
        if membership.voice.alarm and machine.node not in self.world.doubled:
            self.fail("copied", f"{machine.name} raises the alarm of a copied key, and there is no copy")
        for node in membership.roster.conflicts:
            if node not in self.world.doubled:
                self.fail("copied", f"{machine.name} takes {short(node)} for a copied key, and there is no copy")

    def _demands(self, machine: Machine, life: Life) -> None:
        """Everything that is wanted was asked for by a member."""
        assert machine.mediator is not None
        found = machine.mediator.register.demands.known
        if found == life.demands:  # the same objects too
            return
        for key, known in found.items():
            if life.demands.get(key) is known:
                continue
            life.demands[key] = known
            record = known.record
            if self.world.mint.signed.get(record.author, {}).get(record.body) is not Domain.DEMAND:
                self.fail("forged", f"{machine.name} believes a demand that {short(record.author)} never made")

    def admitted(self, machine: Machine, entry: InviteEntry, key: bytes) -> None:
        """The issuer is about to sign a certificate for `key`."""
        kept = decode_book(machine.disk.invites).entries if machine.disk.invites else ()
        durable = [a.public_key for each in kept if each.invite_id == entry.invite_id for a in each.admitted]
        if key not in durable:
            self.fail("invite", f"{machine.name} signs for a key that is not on disk")
        signed = self.signed.setdefault(entry.invite_id, set())
        signed.add(key)
        if len(signed) > entry.uses:
            self.fail("invite", f"an invite for {entry.uses} was used by {len(signed)} keys")

    def _planned(self, machine: Machine, effect: do.MakePlan) -> None:
        assert machine.mediator is not None
        self.plans += 1
        self.plans_of_members += machine.node not in self.world.mint.revoked
        planned = self.lives[machine.at].planned[effect.deployment]
        planned.append(self.world.now)
        if len(planned) == PLANS and planned[-1] - planned[0] < PLANS_S:
            self.fail("restless", f"{machine.name} made {PLANS} plans within {PLANS_S:g} s")
        self._asked(machine, effect)
        for node in effect.inventory.nodes:
            if machine.mediator.membership.barred(node.node) and not node.excluded:
                self.fail("revoked", f"{machine.name} plans with {node.name}")
            if node.node in self.noticed and not node.excluded:
                self.fail("copied", f"{machine.name} plans with {node.name}, whose key runs twice")

    def _asked(self, machine: Machine, effect: do.MakePlan) -> None:
        """While nothing serves, what came to nothing is asked again only after a change, or an attempt."""
        assert machine.mediator is not None
        deployment, asked = machine.mediator.deployments.get(effect.deployment), self.lives[machine.at].asked
        if deployment is None or deployment.current is not None:
            asked.pop(effect.deployment, None)  # given up in the same breath, or a better one is looked for
            return
        question = (deployment.term, effect.demand, effect.inventory)
        if effect.serial > 1 and asked.get(effect.deployment) == question:
            self.fail("restless", f"{machine.name} asks again for a plan of what gave none")
        asked[effect.deployment] = question

    def settled(self, machine: Machine) -> None:
        """After all effects of an event."""
        if machine.mediator is None:
            return
        for node in self.world.mint.revoked:
            if node in machine.links and machine.mediator.membership.barred(node) and node != machine.node:
                self.fail("revoked", f"{machine.name} keeps a link to {short(node)}")

    def sends(self, machine: Machine, frame: bytes) -> None:
        """Before every message goes out."""
        if len(frame) > CONTROL_FRAME:
            self.fail("unbounded", f"{machine.name} sends {len(frame)} bytes, beyond a frame")

    def _roster(self, machine: Machine, life: Life) -> None:
        assert machine.mediator is not None
        entries = machine.mediator.roster.entries
        if len(entries) > ROSTER:
            self.fail("unbounded", f"{machine.name} lists {len(entries)} members")
        present = list(entries.values())
        if present == life.present:  # the same objects, compared without a line of Python
            return
        life.present = present
        for author, entry in entries.items():
            if life.entries.get(author) is entry:
                continue
            life.entries[author] = entry
            self.applied += 1
            body = self._judge(author, entry.record.body, entry.record.signature)
            if body is None or entry.record.author != author or entry.body != body:
                self.fail("forged", f"{machine.name} believes what {short(author)} never said")
            elif body.number < life.numbers.get(author, (0, 0)):
                self.fail("rolled back", f"{machine.name} went back to {body.number} of {body.name}")
            else:
                life.numbers[author] = body.number
                if self.heard is not None:
                    self.heard(machine, author, entry)

    def _judge(self, author: NodeId, raw: bytes, signature: bytes) -> Body | None:
        """The body that `author` really signed; None for any other."""
        key = (author, raw, signature)
        if key not in self.judged:
            signed = self.world.mint.signed.get(author, {}).get(raw) is Domain.ANNOUNCEMENT
            proven = signed and author in self.world.machines and self._verifies(author, raw, signature)
            self.judged[key] = msgspec.msgpack.decode(raw, type=Body) if proven else None
        return self.judged[key]

    def _verifies(self, author: NodeId, raw: bytes, signature: bytes) -> bool:
        authority = self.world.machines[author].authority
        return authority.admit(authority.chain).signed(Domain.ANNOUNCEMENT, raw, signature)

    # --- after the heal -----------------------------------------------------------------------------------------

    def differences(self, under_way_s: float = 0.0) -> list[str]:
        """What keeps the rosters of the running nodes from being equal and right; words may be under way so long."""
        members = self.world.members()
        found = []
        for machine in members:
            assert machine.mediator is not None
            for node in self.world.mint.revoked:
                if not machine.mediator.membership.barred(node) or node in machine.mediator.roster.entries:
                    found.append(f"{machine.name} has not heard that {short(node)} is revoked")
            for other in members:
                if other is machine:
                    continue
                entry = machine.mediator.roster.entries.get(other.node)
                last = other.authority.announced
                if entry is None:
                    found.append(f"{machine.name} does not know {other.name}")
                elif entry.body.number != last and self.world.now - other.authority.announced_at > under_way_s:
                    found.append(f"{machine.name} holds {entry.body.number} of {other.name}, which said {last}")
                elif not entry.present:
                    found.append(f"{machine.name} takes {other.name} for gone")
        return found

    def unnoticed(self, within_s: float) -> list[str]:
        """Who does not know yet of a key that runs on two machines, `within_s` after both were linked to somebody.

        Either may stay outside: whoever has a link to the one that it dialed itself refuses the other.
        """
        found: list[str] = []
        for copy in self.world.copies:
            if not (copy.links and self.world.machines[copy.node].links):
                self.linked_at.pop(copy.at, None)
                continue
            since = self.linked_at.setdefault(copy.at, self.world.now)
            unaware = self._unaware(copy)
            if not unaware:
                self.noticed.add(copy.node)
            elif self.world.now >= since + within_s:
                found += unaware
        return found

    def _unaware(self, copy: Machine) -> list[str]:
        found: list[str] = []
        for machine in self.world.running():
            assert machine.mediator is not None
            membership = machine.mediator.membership
            if machine.node == copy.node:
                if not membership.voice.alarm:
                    found.append(f"{machine.name} has not noticed that its key runs twice")
            elif copy.node not in membership.roster.conflicts:
                found.append(f"{machine.name} has not heard that the key of {copy.name} runs twice")
        return found
