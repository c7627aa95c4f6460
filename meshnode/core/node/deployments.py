"""The models this node was asked for, and the runs that serve each: when to plan, when to cut over, when to try again.

    nothing serves:  plan -> attempt --served--> current          (a broken run waits a moment to be taken over)
    current serves:  something changed -> plan beside it, then in its place -> attempt --served--> current,
                     the former one drains, is fenced, is gone

Invariants: at most one attempt is under way, and it touches nothing of the run that serves before it serves itself (or,
where memory holds only one of them, before all that it needs is on disk); a deployment that is wanted always has a run,
a plan in the making, or a time or change that starts the next plan.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from meshnode.core.coordination.orders import Ended
from meshnode.core.coordination.rules import COORDINATION_RULES, CoordinationRules
from meshnode.core.coordination.run import Run, State
from meshnode.core.node.claims import Draw, claim_of, hops_of, plan_of
from meshnode.core.planning.footprint import ModelFootprint
from meshnode.core.planning.hysteresis import LASTING_S, better
from meshnode.core.planning.inventory import Inventory, NodeInventory
from meshnode.core.planning.plan import Plan
from meshnode.core.planning.prediction import predicted
from meshnode.core.planning.shortfall import Shortfall
from meshnode.identity.ids import NodeId
from meshnode.wire.demand import Demand
from meshnode.wire.fence import Fence, Term, run_id
from meshnode.wire.messages import Claim

SETTLE_S = 0.2
"""A change of the inventory waits this long for the next one, so that three joining nodes make one plan."""
SETTLE_MAX_S = 1.0
"""From the first change at most: where thirty nodes announce themselves, the next change always comes in time."""
LOOK_S = 5.0
"""While a run serves, its plan is compared with a new one at most so often: announcements change all the time."""
SPARE_S = 1.0
"""The same where one of its machines is to be spared: somebody waits to switch it off."""
RETRY_MIN_S = 0.5
RETRY_MAX_S = 16.0
"""A random time of 0.5 to 1 s, doubled up to this: two coordinators that refuse each other do not do so for ever."""
LEARNED = frozenset({"old_term", "held"})
LEARNED_S = 2.0
"""At most, after a refusal that says what to wait for: another term, or the silence of a holder that is gone."""
AGAIN_S = 2.0
"""After a shortfall while a node is silent, until its link is lost or it is heard again."""
EXCLUDE_S = 30.0
EXCLUDE_MAX_S = 600.0
DRAIN_S = 600.0
"""For the streams of a run whose successor serves: a long answer at one token a second."""
MAKE_ROOM_S = 60.0
"""The same where nothing serves meanwhile: whoever waits for an answer is not told 503 for longer than that."""
KEEP_S = 10.0
"""Slices of a broken run wait so long to be taken over: a plan takes milliseconds, a refused claim a second or two."""
ROOM_S = 10.0
"""A refusal's word on free memory stands against the announcement so long: two rounds of anti-entropy bring a newer
one."""
BLAMELESS = frozenset(
    {"participant_lost", "old_term", "stage_lost", "lease_lost", "held", "bad_demand", "old_demand", "not_wanted"}
)
"""Ends that say nothing against planning with the node again."""

_PRESENT = frozenset({"", "draining", "failed"})
"""Exclusions of nodes that can still do what they did before."""


class Phase(Enum):
    """Where a deployment is; its runs have states of their own."""

    WAITING = "waiting"
    PLANNING = "planning"
    RUNNING = "running"


class Place(Enum):
    """Where the next run is to have room."""

    BESIDE = "beside"
    """In memory that the present run leaves free: it serves until the new one does."""
    INSTEAD = "instead"
    """In the present run's memory too, which ends before the new one is loaded."""


@dataclass
class Exclusion:
    """A node this coordinator does not plan with for a while, unless there is no plan without it."""

    until: float
    reason: str
    times: int = 1


@dataclass
class Deployment:
    """One wanted model."""

    demand: Demand
    footprint: ModelFootprint
    created: int
    coordinator: NodeId
    startup_timeout_s: float
    plan_at: float | None
    rules: CoordinationRules = COORDINATION_RULES
    term: int = 0
    current: Run | None = None
    """The run that serves."""
    attempt: Run | None = None
    """The run that is on its way."""
    former: dict[Fence, Run] = field(default_factory=dict)
    """Runs that drain, or broke and wait to be taken over."""
    planning: bool = False
    settled_by: float | None = None
    """When the changes since the last plan are not waited with any more."""
    news: bool = False
    """Something changed while a plan was in the making."""
    serial: int = 0
    place: Place = Place.BESIDE
    asked: Inventory | None = None
    """What the plan in the making is made from."""
    answered: dict[Place | bool, Inventory] = field(default_factory=dict)
    """What gave no gain over the run that serves, by place, or no plan at all, without and with nodes that failed:
    announcements come all the time, and mostly say nothing new."""
    plans: dict[Fence, Plan] = field(default_factory=dict)
    before: Plan | None = None
    """That of a run which ended to make room, until its successor serves: what to go back to."""
    note: str = ""
    failures: int = 0
    excluded: dict[NodeId, Exclusion] = field(default_factory=dict)
    rooms: dict[NodeId, tuple[float, int]] = field(default_factory=dict)
    """What nodes that refused for want of room said they have, and until when that counts."""
    short: bool = False
    """The last plan was a shortfall: it waits for changes, not for a failure to be forgotten."""
    lenient: bool = False
    """The plan in the making may use excluded nodes: without them there is none."""
    looked_at: float = float("-inf")
    better_since: float | None = None
    has_file: bool = True
    """Whether the model's file is here; else its bytes are where nodes say so."""
    inherited: Claim | None = None
    """The run of a coordinator that is gone, as this node holds it: to be claimed as it is, for as long as all of its
    stages are there."""
    inherits: Fence | None = None
    """That run, until one of this coordinator serves."""
    predecessors: frozenset[NodeId] = frozenset()
    """Who coordinated it before."""
    silent: set[NodeId] = field(default_factory=set)
    """Nodes of a run that was lost of which nothing is heard, while their links still stand: a cut cable is noticed by
    its link after 8 s only."""
    leaving: bool = False
    """Another coordinator serves it: nothing new is begun, what streams may end."""

    # --- what there is --------------------------------------------------------------------------------------------

    @property
    def run(self) -> Run | None:
        """The run that people are shown: the one that serves, or is to."""
        return self.current or self.attempt

    @property
    def failed(self) -> bool:
        """It could not be brought up, and nothing is tried just now."""
        return bool(self.failures) and self.run is None and self.phase is not Phase.PLANNING

    @property
    def phase(self) -> Phase:
        """What happens at present."""
        if self.run is not None:
            return Phase.RUNNING
        return Phase.PLANNING if self.planning else Phase.WAITING

    @property
    def plan(self) -> Plan | None:
        """The plan of the run that serves."""
        return self.plans.get(self.current.fence) if self.current is not None else None

    def runs(self) -> list[Run]:
        """All that participants may hold something for."""
        return [run for run in (self.current, self.attempt, *self.former.values()) if run is not None]

    def missed(self) -> set[NodeId]:
        """Nodes whose loss may be why nothing serves."""
        broken = {node for run in self.former.values() if run.state is State.BROKEN for node in run.participants}
        return broken | self.predecessors

    def find(self, fence: Fence) -> Run | None:
        """The run of that fence."""
        return next((run for run in self.runs() if run.fence == fence), None)

    # --- when to plan ---------------------------------------------------------------------------------------------

    def changed(self, now: float, spared: Container[NodeId] = ()) -> None:
        """The inventory changed: plan again soon, if a plan is missing or the present one could be bettered. `spared`:
        nodes that are to have no work; they may be about to leave."""
        self.news = self.news or self.planning
        if self.current is not None:
            urgent = any(node in spared for node in self.current.participants)
            at = max(now + SETTLE_S, self.looked_at + (SPARE_S if urgent else LOOK_S))
            if self.plan_at is None or ((urgent or self.better_since is not None) and at < self.plan_at):
                self.plan_at = at
        elif self.plan_at is None or self.failures == 0 or self.short:
            self.settled_by = now + SETTLE_MAX_S if self.settled_by is None else self.settled_by
            self.plan_at = min(now + SETTLE_S, self.settled_by)

    def wake_at(self) -> float | None:
        """When `due` will say so."""
        return self.plan_at if self._may_plan() else None

    def due(self, now: float) -> bool:
        """Whether to plan now; True marks a plan as being made."""
        if self.plan_at is None or now < self.plan_at or not self._may_plan():
            return False
        if self.current is None:
            self.place, self.news = Place.INSTEAD, False
        self.looked_at, self.settled_by = now, None
        self.planning, self.plan_at, self.serial = True, None, self.serial + 1
        return True

    def view(self, inventory: Inventory, now: float) -> Inventory:
        """The inventory as this deployment may use it."""
        self.excluded = {node: x for node, x in self.excluded.items() if now < x.until + EXCLUDE_MAX_S}
        self.rooms = {node: (until, room) for node, (until, room) in self.rooms.items() if now < until}
        nodes = tuple(self._judged(node, now) for node in inventory.nodes)
        self.asked = Inventory(nodes, inventory.links, inventory.head)
        return self.asked

    def knows(self, inventory: Inventory, now: float) -> bool:
        """Whether the plan that is due would be made of what gave nothing before; True: it is not to be made."""
        alike = (False, True) if self.current is None else (self.place,)
        if self.better_since is not None or inventory not in [self.answered.get(each) for each in alike]:
            return False
        self.planning = False
        if self.current is None:
            self._wait(now)
        else:
            self._nothing_better(self.current, now)
        return True

    def _wait(self, now: float) -> None:
        """There is no plan: ask with those that failed, then wait for what may change."""
        lenient, self.lenient = self.lenient, False
        if not lenient and "failed" in self._members().values():
            self.lenient, self.plan_at = True, now
            return
        # Exclusions that ended are remembered for their count, and are no reason to plan again.
        times = [*(x.until for x in self.excluded.values()), *(until for until, _ in self.rooms.values())]
        times += [now + SETTLE_S] if self.news else []  # who was missing may have come while this was worked out
        times += [now + AGAIN_S] if self.silent else []  # they may be heard again, and nobody says so
        self.plan_at = min((at for at in times if at > now), default=None)

    def _nothing_better(self, current: Run, now: float) -> None:
        """The place that was asked for gives no gain: ask for the other, then wait for news; while somebody is to leave
        and cannot be spared, look whether exclusions ended."""
        if self.place is Place.BESIDE:
            self.place, self.plan_at = Place.INSTEAD, now
        else:
            self.place, self.better_since = Place.BESIDE, None
            self.plan_at = now + LOOK_S if self.news or self._forced(current) else None
            self.news = False

    def _forced(self, current: Run) -> bool:
        """Whether one of its nodes is to have no work."""
        members = self._members()
        return any(members.get(node) == "draining" for node in current.participants)

    def _members(self) -> dict[NodeId, str]:
        """Why each may not take part, as the plan in question saw it; empty if it may."""
        return {} if self.asked is None else {node.node: node.excluded for node in self.asked.nodes}

    def _may_plan(self) -> bool:
        idle = not self.planning and self.attempt is None and not self.leaving
        return idle and not (self.current is not None and self._draining())

    def _judged(self, node: NodeInventory, now: float) -> NodeInventory:
        if node.node in self.silent and not node.excluded:
            return msgspec.structs.replace(node, excluded="unreachable")
        if node.node in self.rooms:
            room = min(node.usable_bytes, self.rooms[node.node][1])
            node = msgspec.structs.replace(node, usable_bytes=room)
        exclusion = self.excluded.get(node.node)
        if exclusion is None or now >= exclusion.until or node.excluded or self.lenient:
            return node
        return msgspec.structs.replace(node, excluded="failed")

    # --- what came of it ------------------------------------------------------------------------------------------

    def planned(self, serial: int, outcome: Plan | Shortfall, draw: Draw, now: float) -> Run | None:
        """Take a plan; a run to start, or None."""
        if not self.planning or serial != self.serial:
            return None
        self.planning = False
        if self.current is not None:
            self.lenient = False
            return self._compare(self.current, outcome, draw, now)
        broken = [run.fence for run in self.former.values() if run.state is State.BROKEN]
        broken += [self.inherits] if self.inherits is not None else []
        if isinstance(outcome, Shortfall) and self.before is not None:
            members = self._members()
            there = all(members.get(node, "gone") in _PRESENT for node in self.before.nodes)
            outcome = self.before if there else outcome
        self.short = isinstance(outcome, Shortfall)
        if isinstance(outcome, Shortfall):
            self.note = outcome.text()
            if self.asked is not None:
                self.answered[self.lenient] = self.asked
            self._wait(now)
            return None
        return self._attempt(outcome, max(broken, default=None), draw)

    def inherit(self, inventory: Inventory, draw: Draw) -> Run | None:
        """In place of a plan: the run of the coordinator before as it was, so that all of its slices stay loaded; None
        where one of its nodes is not there, or it came to nothing before."""
        claim, excluded = self.inherited, {node.node: node.excluded for node in inventory.nodes}
        if claim is None or any(excluded.get(stage.node, "gone") for stage in claim.stages):
            self.inherited = None
            return None
        self.planning = False
        return self._attempt(plan_of(claim, self.demand), claim.fence, draw)

    def plan_failed(self, serial: int, message: str, now: float) -> None:
        """No plan and no shortfall either: try again later, and show why."""
        if self.planning and serial == self.serial:
            self.planning, self.note, self.failures = False, message, self.failures + 1
            self.plan_at = now + 2 * RETRY_MAX_S

    def _compare(self, current: Run, outcome: Plan | Shortfall, draw: Draw, now: float) -> Run | None:
        """A plan was made while a run serves: whether to replace that one."""
        forced = self._forced(current)
        if not isinstance(outcome, Plan) or not (forced or self._gains(current, outcome)):
            if self.asked is not None:
                self.answered[self.place] = self.asked
            self._nothing_better(current, now)
            return None
        if not forced:
            self.better_since = now if self.better_since is None else self.better_since
            if now < self.better_since + LASTING_S:
                self.place, self.plan_at = Place.BESIDE, self.better_since + LASTING_S
                return None
        # On other machines it takes nobody's place: what seemed to be in the way there was an attempt that ended.
        displaces = self.place is Place.INSTEAD and not set(current.participants).isdisjoint(outcome.nodes)
        return self._attempt(outcome, current.fence if displaces else None, draw)

    def _gains(self, current: Run, new: Plan) -> bool:
        """Whether `new` is better than the plan of `current` as the same inventory sees it."""
        if self.asked is None:
            return False
        old = predicted(self.plans[current.fence], self.footprint, self.asked)
        return old is not None and better(old, new)

    def _attempt(self, plan: Plan, releases: Fence | None, draw: Draw) -> Run:
        self.note, self.term, self.place, self.better_since = "", self.term + 1, Place.BESIDE, None
        self.lenient = False
        self.answered.clear()
        fence = Fence(Term(self.term), run_id(draw(8)))
        claim = claim_of(plan, fence, self.coordinator, len(self.footprint.layers), releases)
        hops = hops_of(claim, draw)
        drain_first = self.current is not None and releases is not None
        self.attempt = Run(claim, self.demand.author, hops, self.startup_timeout_s, drain_first, self.rules)
        self.plans[fence] = plan
        return self.attempt

    # --- what became of the runs ----------------------------------------------------------------------------------

    def served(self, now: float) -> list[Run]:
        """The attempt serves: the runs that have to go now."""
        assert self.attempt is not None
        if self.current is not None:
            self.former[self.current.fence] = self.current
        self.current, self.attempt, self.failures, self.before = self.attempt, None, 0, None
        self.inherited = self.inherits = None
        self.predecessors = frozenset()
        self.plan_at = now + LOOK_S  # what changed meanwhile was not looked at
        return list(self.former.values())

    def ended(self, run: Run, end: Ended, draw: Draw, now: float) -> None:
        """A run ended or broke: when to plan the next, and whom to leave out of it."""
        self.term = max(self.term, end.promised)
        if run is self.attempt:
            self.attempt = None
            self.inherited = self.inherited if end.reason in ("held", "old_term") else None
            self._failed(run, end, draw, now)
        elif run is self.current:
            self.current, self.better_since, self.note = None, None, end.message
            if run.state is State.BROKEN:
                self.former[run.fence] = run
                run.keep(now, KEEP_S)
            self.failures = 0
            self.plan_at, self.settled_by, self.news = now + SETTLE_S, None, self.news or self.planning
        else:
            self.former.pop(run.fence, None)
            if end.reason == "replaced":
                self.before = self.plans[run.fence]
        self.plans = {fence: plan for fence, plan in self.plans.items() if self.find(fence) is not None}

    def resumed(self) -> Run | None:
        """A run that drains and can serve again, where nothing else does; it is the current one from now on."""
        draining = self._draining()
        if self.current is not None or not draining or (self.attempt is not None and self.attempt.drain_first):
            return None
        self.current = max(draining, key=lambda run: run.fence)
        del self.former[self.current.fence]
        return self.current

    def yields_to(self, attempt: Run) -> Run | None:
        """The run that has to end before `attempt` can be loaded; it is not the current one any more."""
        if self.current is None or self.current.fence != attempt.claim.releases:
            return None
        yielding, self.current = self.current, None
        self.former[yielding.fence] = yielding
        return yielding

    def waiting(self) -> Run | None:
        """The attempt, where all that it waited for is gone."""
        attempt = self.attempt
        return attempt if attempt is not None and attempt.waits_for_room and not self._draining() else None

    def _draining(self) -> list[Run]:
        return [run for run in self.former.values() if run.state is State.DRAINING]

    def _failed(self, run: Run, end: Ended, draw: Draw, now: float) -> None:
        self.note, self.failures = end.message, self.failures + 1
        claimed = sum(stage.reserved_bytes for stage in run.claim.stages if stage.node == end.node)
        if end.node is not None and end.reason == "no_room" and end.room is not None and end.room < claimed:
            self.rooms[end.node] = now + ROOM_S, end.room
        elif end.node is not None and end.reason not in BLAMELESS:
            times = self.excluded[end.node].times + 1 if end.node in self.excluded else 1
            until = now + min(EXCLUDE_S * 2 ** (times - 1), EXCLUDE_MAX_S)
            self.excluded[end.node] = Exclusion(until, end.reason, times)
        share = 1 + int.from_bytes(draw(2), "big") / 65536
        most = LEARNED_S if end.reason in LEARNED else RETRY_MAX_S
        self.plan_at = now + min(RETRY_MIN_S * share * 2 ** min(self.failures - 1, 16), most)
