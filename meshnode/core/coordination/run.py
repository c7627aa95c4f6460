"""A coordinator's side of one run: the transition table from claim to fence.

    CLAIMING   -- every participant granted ---------------> PREPARING, or FETCHING where it takes another run's place
    FETCHING   -- every slice is on its disk, old run gone -> PREPARING
    PREPARING  -- every stage is ready --------------------> CONNECTING
    CONNECTING -- head opened: its probe came back --------> COMMITTING   (the decision is on disk first)
    COMMITTING -- every participant has it on disk --------> SERVING
    SERVING    -- a later run serves ----------------------> DRAINING -- its last stream ended --> ENDED
    SERVING    -- a participant, a stage, the head is lost -> BROKEN   -- its slices were taken over, or not --> ENDED
    any        -- refusal, failure, loss, silence, abort ---> ENDED

Invariants: a run that ended or broke never serves again, and everybody who was asked for a grant is told or left to the
end of its lease; nothing is ordered later than ACT_S after the oldest renewal that every participant acknowledged.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import assert_never

from meshnode.core.coordination.ledger import TERM_JUMP
from meshnode.core.coordination.orders import (
    CloseHead,
    Decide,
    Drained,
    DrainHead,
    Ended,
    FetchedAll,
    Hops,
    OpenHead,
    Order,
    RunOrder,
    Served,
    ServeHead,
)
from meshnode.core.coordination.rules import COORDINATION_RULES, CoordinationRules
from meshnode.identity.ids import NodeId
from meshnode.wire.fence import Fence
from meshnode.wire.messages import (
    Abort,
    AnyMessage,
    Claim,
    Commit,
    Committed,
    Connect,
    Connected,
    Failed,
    FenceOff,
    Fetched,
    Grant,
    Hop,
    Prepare,
    Progress,
    Ready,
    Refuse,
    Renew,
    Renewed,
)

CLAIM_S = 10.0
"""A grant is one disk write away; a node that needs longer is excluded."""
CONNECT_S = 30.0
"""Dials and handshakes of every hop, and the probe."""
COMMIT_S = 10.0
"""As a claim: one disk write at each participant."""
RENEW_S = 5.0
ACT_S = 12.0
"""After the sending of the oldest renewal that all participants acknowledged; they free 15 s after its receipt, and the
difference covers clocks that run 20 % apart for so long (COORDINATION)."""
RENEWALS = 4
"""Numbers remembered: three fit into ACT_S."""
TEXT_CHARACTERS = 1000
"""Of a participant's reason that are kept for people: a native error with its last lines fits."""


class State(Enum):
    """Where a run is."""

    CLAIMING = "claiming"
    FETCHING = "fetching"
    PREPARING = "preparing"
    CONNECTING = "connecting"
    COMMITTING = "committing"
    SERVING = "serving"
    DRAINING = "draining"
    BROKEN = "broken"
    ENDED = "ended"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.CLAIMING: frozenset({State.FETCHING, State.PREPARING, State.ENDED}),
    State.FETCHING: frozenset({State.PREPARING, State.ENDED}),
    State.PREPARING: frozenset({State.CONNECTING, State.ENDED}),
    State.CONNECTING: frozenset({State.COMMITTING, State.ENDED}),
    State.COMMITTING: frozenset({State.SERVING, State.ENDED}),
    State.SERVING: frozenset({State.DRAINING, State.BROKEN, State.ENDED}),
    State.DRAINING: frozenset({State.SERVING, State.ENDED}),
    State.BROKEN: frozenset({State.ENDED}),
    State.ENDED: frozenset(),
}
UNDER_WAY = frozenset({State.CLAIMING, State.FETCHING, State.PREPARING, State.CONNECTING, State.COMMITTING})
"""Nobody depends on such a run yet: whatever goes wrong ends it."""


@dataclass
class Run:
    """One attempt to serve a deployment. Every method returns what to do, in order."""

    claim: Claim
    source: NodeId
    hops: Hops
    startup_timeout_s: float
    drain_first: bool = False
    """It takes the place of a run that still serves, which ends only when all that has to be fetched is there."""
    rules: CoordinationRules = COORDINATION_RULES
    sources: tuple[NodeId, ...] = ()
    """Others that have some of the bytes."""
    state: State = State.CLAIMING
    deadline: float | None = None
    granted: set[NodeId] = field(default_factory=set)
    committed: set[NodeId] = field(default_factory=set)
    stages: dict[int, str] = field(default_factory=dict)
    progress: dict[int, Progress] = field(default_factory=dict)
    _number: int = 0
    _renew_at: float = 0.0
    _sent: dict[int, float] = field(default_factory=dict)
    _acknowledged: dict[NodeId, float] = field(default_factory=dict)

    @property
    def fence(self) -> Fence:
        """Its (term, run)."""
        return self.claim.fence

    @property
    def participants(self) -> list[NodeId]:
        """Every node of the plan once, in order of the stages."""
        return list(dict.fromkeys(stage.node for stage in self.claim.stages))

    @property
    def waits_for_room(self) -> bool:
        """Everything is fetched, and the run in whose place it comes is what it waits for."""
        return self.state is State.FETCHING and self.deadline is None

    def start(self, now: float) -> list[RunOrder]:
        """Ask every participant; the claim is the first renewal."""
        self.deadline = now + CLAIM_S
        self._sent[0], self._renew_at = now, now + RENEW_S
        self.stages = {stage.stage: "claimed" for stage in self.claim.stages}
        return [Order(node, self.claim) for node in self.participants]

    # --- what participants say ------------------------------------------------------------------------------------

    def received(self, peer: NodeId, message: AnyMessage, now: float) -> list[RunOrder]:
        """A participant's answer or report about this run; those of strangers and of past states change nothing."""
        if self.state is State.ENDED or peer not in self.participants:
            return []
        match message:
            case Grant():
                return self._granted(peer, now)
            case Refuse():
                # A claim may jump no further than TERM_JUMP: a liar must not drive the terms where nobody follows.
                promised = min(message.promised, self.fence.term + TERM_JUMP - 1)
                orders = self._lose(_told(message.reason), _told(message.message), peer, promised)
                room = message.free_bytes if message.reason == "no_room" else None
                return [replace(o, room=room) if isinstance(o, Ended) else o for o in orders]
            case Renewed():
                return self._renewed(peer, message)
            case Committed():
                return self._committed(peer)
            case Progress() | Fetched() | Ready() | Connected() | Failed():
                if (message.stage, peer) not in [(stage.stage, stage.node) for stage in self.claim.stages]:
                    return []
                return self._reported(peer, message, now)
            case _:
                return []

    def head_opened(self, now: float) -> list[RunOrder]:
        """The probe went through all stages: commit."""
        if self.state is not State.CONNECTING:
            return []
        self._go(State.COMMITTING, now + COMMIT_S)
        return [Decide(self.fence), *(Order(node, Commit(self.fence)) for node in self.participants)]

    def room_made(self, now: float) -> list[RunOrder]:
        """The run whose place this one takes is gone: load."""
        return self._prepare_all(now) if self.state is State.FETCHING else []

    def lost(self, node: NodeId, message: str) -> list[RunOrder]:
        """A participant is gone."""
        if node not in self.participants or self.state is State.BROKEN:
            return []
        return self._lose("participant_lost", message, node)

    def head_failed(self, message: str, reason: str = "stage_lost") -> list[RunOrder]:
        """The head could not be opened, the probe failed, or the pipeline was lost."""
        return self._lose(reason, message)

    def expire(self, now: float) -> list[RunOrder]:
        """Judge the deadline of the present state, and the leases."""
        if self.state in (State.ENDED, State.BROKEN):
            return self._end("not_taken_over", "nobody needed its slices") if self._is_over(now) else []
        oldest = self._oldest()
        if self.state is not State.CLAIMING and now >= oldest[0] + ACT_S:
            return self._lose("lease_lost", "a participant did not renew its lease in time", oldest[1])
        if not self._is_over(now):
            return []
        if self.state is State.DRAINING:
            self.deadline = None
            return [Drained(self.fence)]
        waiting = {
            State.CLAIMING: [node for node in self.participants if node not in self.granted],
            State.FETCHING: self._nodes_not("fetched"),
            State.PREPARING: self._nodes_not("ready"),
            State.CONNECTING: self._nodes_not("connected"),
            State.COMMITTING: [node for node in self.participants if node not in self.committed],
        }.get(self.state, [])
        return self._lose("timed_out", f"no progress while {self.state.value}", waiting[0] if waiting else None)

    def renewals(self, now: float) -> list[RunOrder]:
        """The renewals that are due."""
        if self.state is State.ENDED or now < self._renew_at:
            return []
        self._number, self._renew_at = self._number + 1, now + RENEW_S
        self._sent[self._number] = now
        self._sent.pop(self._number - RENEWALS, None)
        return [Order(node, Renew(self.fence, self._number)) for node in self.participants]

    def due_at(self) -> float | None:
        """When `expire` or `renewals` has something to do; None once it ended."""
        if self.state is State.ENDED:
            return None
        due = self._renew_at
        if self.deadline is not None and self.deadline < due:
            due = self.deadline
        if self.state is State.CLAIMING or self.state is State.BROKEN:
            return due
        return min(due, self._oldest()[0] + ACT_S)

    # --- what its deployment wants --------------------------------------------------------------------------------

    def drain(self, now: float, seconds: float) -> list[RunOrder]:
        """Another run serves from now on: finish what streams, within a bound."""
        if self.state is not State.SERVING:
            return []
        self._go(State.DRAINING, now + seconds)
        return [DrainHead(self.fence)]

    def resume(self) -> list[RunOrder]:
        """The other run failed before this one was fenced: serve on."""
        if self.state is not State.DRAINING:
            return []
        self._go(State.SERVING, None)
        return [ServeHead(self.fence)]

    def keep(self, now: float, seconds: float) -> None:
        """Broken: how long its slices wait for a run that takes them over."""
        assert self.state is State.BROKEN
        self.deadline = now + seconds

    def give_way(self, new: Claim) -> list[RunOrder]:
        """The run of `new` is about to be loaded in its place: end, but leave its slices to those that load."""
        if self.state is State.ENDED:
            return []
        loading = {stage.node for stage in new.stages}
        return [order for order in self._end("replaced", "its successor takes its place") if _goes(order, loading)]

    def fence_off(self, new: Claim) -> list[RunOrder]:
        """The run of `new` serves everywhere, and nothing streams here any more: it never comes back."""
        if self.state is State.ENDED:
            return []
        nodes = dict.fromkeys([*self.participants, *(stage.node for stage in new.stages)])
        fenced: list[RunOrder] = [Order(node, FenceOff(new.fence, new.deployment)) for node in nodes]
        return fenced + [order for order in self._end("drained", "") if not isinstance(order, Order)]

    def end(self, reason: str, message: str) -> list[RunOrder]:
        """End it from this side, and tell everybody: withdrawn, drained, shutting down."""
        return self._end(reason, message)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _granted(self, peer: NodeId, now: float) -> list[RunOrder]:
        if self.state is not State.CLAIMING:
            return []
        self.granted.add(peer)
        asked = min(self._sent.values())  # the claim, as long as it is remembered
        self._acknowledged[peer] = max(self._acknowledged.get(peer, asked), asked)
        if self.rules.unanimity and len(self.granted) < len(self.participants):
            return []
        if self.drain_first:
            self._go(State.FETCHING, now + self.startup_timeout_s)
            return [Order(stage.node, self._prepare(stage.stage, hold=True)) for stage in self.claim.stages]
        return self._prepare_all(now)

    def _prepare_all(self, now: float) -> list[RunOrder]:
        self._go(State.PREPARING, now + self.startup_timeout_s)
        return [Order(stage.node, self._prepare(stage.stage)) for stage in self.claim.stages]

    def _renewed(self, peer: NodeId, message: Renewed) -> list[RunOrder]:
        if not message.held:
            return self.lost(peer, "it was restarted, or its lease had ended")
        sent = self._sent.get(message.number)
        if sent is not None and peer in self._acknowledged:
            self._acknowledged[peer] = max(self._acknowledged[peer], sent)
        return []

    def _committed(self, peer: NodeId) -> list[RunOrder]:
        if self.state is not State.COMMITTING:
            return []
        self.committed.add(peer)
        if len(self.committed) < len(self.participants):
            return []
        self._go(State.SERVING, None)
        return [ServeHead(self.fence), Served(self.fence)]

    def _reported(
        self, peer: NodeId, report: Progress | Fetched | Ready | Connected | Failed, now: float
    ) -> list[RunOrder]:
        match report:
            case Progress():
                self.stages[report.stage] = report.phase
                if self.progress.get(report.stage) != report and self.state in (State.FETCHING, State.PREPARING):
                    self.deadline = now + self.startup_timeout_s
                self.progress[report.stage] = report
                return []
            case Fetched():
                self.stages[report.stage] = "fetched"
                if self.state is not State.FETCHING or self._nodes_not("fetched"):
                    return []
                self.deadline = None  # what it waits for now has a bound of its own
                return [FetchedAll(self.fence)]
            case Ready():
                self.stages[report.stage] = "ready"
                if self.state is not State.PREPARING or self._nodes_not("ready"):
                    return []
                self._go(State.CONNECTING, now + CONNECT_S)
                orders: list[RunOrder] = [Order(node, Connect(self.fence)) for node in self.participants]
                return [*orders, OpenHead(self.fence)]
            case Connected():
                self.stages[report.stage] = "connected"
                return []
            case Failed():
                self.stages[report.stage] = "failed"
                return self._lose(_told(report.reason), _told(report.message), peer)
            case _:
                assert_never(report)

    def _prepare(self, stage: int, *, hold: bool = False) -> Prepare:
        claim, hops, count = self.claim, self.hops, len(self.claim.stages)
        nodes = [claimed.node for claimed in claim.stages]
        above = hops.names[stage - 1] if stage else hops.names[count]
        below = hops.names[stage + 1]
        return Prepare(
            fence=self.fence,
            deployment=claim.deployment,
            manifest_digest=claim.manifest_digest,
            source=self.source,
            sources=self.sources,
            stage=stage,
            stages=count,
            first=claim.stages[stage].first,
            last=claim.stages[stage].last,
            layers=claim.layers,
            options=claim.options,
            upstream=Hop(hops.tokens[stage], above, nodes[stage - 1] if stage else claim.coordinator),
            downstream=Hop(hops.tokens[stage + 1], below, nodes[stage + 1] if stage + 1 < count else claim.coordinator),
            hold=hold,
        )

    def _nodes_not(self, state: str) -> list[NodeId]:
        return [stage.node for stage in self.claim.stages if self.stages.get(stage.stage) != state]

    def _oldest(self) -> tuple[float, NodeId]:
        """The oldest acknowledged renewal, and whose it is."""
        return min((self._acknowledged.get(node, self._sent.get(0, 0.0)), node) for node in self.participants)

    def _is_over(self, now: float) -> bool:
        return self.state is not State.ENDED and self.deadline is not None and now >= self.deadline

    def _go(self, state: State, deadline: float | None) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state} -> {state}"
        self.state, self.deadline = state, deadline

    def _lose(self, reason: str, message: str, node: NodeId | None = None, promised: int = 0) -> list[RunOrder]:
        """Something went wrong: a run that serves breaks, so that what is left of it can be taken over."""
        if self.state is not State.SERVING:
            return [] if self.state is State.BROKEN else self._end(reason, message, node, promised)
        self._go(State.BROKEN, None)
        return [CloseHead(self.fence), Ended(self.fence, reason, message, node, promised, served=True)]

    def _end(self, reason: str, message: str, node: NodeId | None = None, promised: int = 0) -> list[RunOrder]:
        if self.state is State.ENDED:
            return []
        before = self.state
        self._go(State.ENDED, None)
        headed = before in (State.CONNECTING, State.COMMITTING, State.SERVING, State.DRAINING)
        orders: list[RunOrder] = [CloseHead(self.fence)] if headed else []
        orders += [Order(participant, Abort(self.fence, reason)) for participant in self.participants]
        served = before in (State.SERVING, State.DRAINING, State.BROKEN)
        return [*orders, Ended(self.fence, reason, message, node, promised, served)]


def _goes(order: RunOrder, loading: set[NodeId]) -> bool:
    return not (isinstance(order, Order) and order.node in loading)


def _told(text: str) -> str:
    """A participant's words as one printable line: they come to a terminal and a log."""
    return "".join(c if c.isprintable() else " " for c in text[:TEXT_CHARACTERS])
