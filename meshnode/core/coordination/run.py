"""A coordinator's side of one run: the transition table from claim to serving.

    CLAIMING   -- every participant granted --------------> PREPARING
    PREPARING  -- every stage is ready -------------------> CONNECTING
    CONNECTING -- every stage connected, head opened -----> SERVING      (the head's probe went through all stages)
    any        -- refusal, failure, loss, silence, abort -> ENDED

Invariant: a run that ended never serves again, and everybody who was asked for a grant is told.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import assert_never

from meshnode.core.coordination.ledger import TERM_JUMP
from meshnode.identity.ids import NodeId
from meshnode.wire.fence import Fence
from meshnode.wire.messages import (
    Abort,
    AnyMessage,
    Claim,
    Commit,
    Connect,
    Connected,
    Failed,
    Grant,
    Hop,
    Prepare,
    Progress,
    Ready,
    Refuse,
)

CLAIM_S = 10.0
"""A grant is one disk write away; a node that needs longer is excluded."""
CONNECT_S = 30.0
"""Dials and handshakes of every hop, and the probe."""
TEXT_CHARACTERS = 1000
"""Of a participant's reason that are kept for people: a native error with its last lines fits."""


class State(Enum):
    """Where a run is."""

    CLAIMING = "claiming"
    PREPARING = "preparing"
    CONNECTING = "connecting"
    SERVING = "serving"
    ENDED = "ended"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.CLAIMING: frozenset({State.PREPARING, State.ENDED}),
    State.PREPARING: frozenset({State.CONNECTING, State.ENDED}),
    State.CONNECTING: frozenset({State.SERVING, State.ENDED}),
    State.SERVING: frozenset({State.ENDED}),
    State.ENDED: frozenset(),
}


@dataclass(frozen=True)
class Order:
    """Send `message` to `node` (which may be this node itself)."""

    node: NodeId
    message: AnyMessage


@dataclass(frozen=True)
class OpenHead:
    """Connect the head of this run to its first and last stage and probe it."""

    fence: Fence


@dataclass(frozen=True)
class CloseHead:
    """End the head of this run; whatever streams through it gets a typed error."""

    fence: Fence


@dataclass(frozen=True)
class Ended:
    """The run ended. `node` is the participant to blame, if one is; `promised` the term it would not go below."""

    fence: Fence
    reason: str
    message: str
    node: NodeId | None = None
    promised: int = 0
    served: bool = False
    """Whether it had come as far as serving."""


RunOrder = Order | OpenHead | CloseHead | Ended


@dataclass(frozen=True)
class Hops:
    """Tokens of a run: `tokens[k]` is the stream into stage k, the last one the return stream into the head."""

    tokens: tuple[bytes, ...]
    names: tuple[str, ...]
    """Certificate names: stages 0..n-1, then the head."""


@dataclass
class Run:
    """One attempt to serve a deployment. Every method returns what to do, in order."""

    claim: Claim
    source: NodeId
    hops: Hops
    startup_timeout_s: float
    state: State = State.CLAIMING
    deadline: float | None = None
    granted: set[NodeId] = field(default_factory=set)
    stages: dict[int, str] = field(default_factory=dict)
    progress: dict[int, Progress] = field(default_factory=dict)

    @property
    def fence(self) -> Fence:
        """Its (term, run)."""
        return self.claim.fence

    @property
    def participants(self) -> list[NodeId]:
        """Every node of the plan once, in order of the stages."""
        return list(dict.fromkeys(stage.node for stage in self.claim.stages))

    def start(self, now: float) -> list[RunOrder]:
        """Ask every participant."""
        self.deadline = now + CLAIM_S
        self.stages = {stage.stage: "claimed" for stage in self.claim.stages}
        return [Order(node, self.claim) for node in self.participants]

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
                return self._end(_told(message.reason), _told(message.message), peer, promised)
            case Progress() | Ready() | Connected() | Failed():
                if (message.stage, peer) not in [(stage.stage, stage.node) for stage in self.claim.stages]:
                    return []
                return self._reported(peer, message, now)
            case _:
                return []

    def head_opened(self, now: float) -> list[RunOrder]:
        """The probe went through all stages."""
        if self.state is not State.CONNECTING:
            return []
        self._go(State.SERVING, None)
        return [Order(node, Commit(self.fence)) for node in self.participants]

    def lost(self, node: NodeId, message: str) -> list[RunOrder]:
        """A participant is gone."""
        if node not in self.participants:
            return []
        return self._end("participant_lost", message, node)

    def end(self, reason: str, message: str) -> list[RunOrder]:
        """End it from this side: withdrawn, head failed, shutting down."""
        return self._end(reason, message)

    def expire(self, now: float) -> list[RunOrder]:
        """Judge the deadline of the present state."""
        if self.deadline is None or now < self.deadline:
            return []
        waiting = {
            State.CLAIMING: [node for node in self.participants if node not in self.granted],
            State.PREPARING: self._nodes_not("ready"),
            State.CONNECTING: self._nodes_not("connected"),
        }.get(self.state, [])
        blamed = waiting[0] if waiting else None
        return self._end("timed_out", f"no progress while {self.state.value}", blamed)

    def _granted(self, peer: NodeId, now: float) -> list[RunOrder]:
        if self.state is not State.CLAIMING:
            return []
        self.granted.add(peer)
        if len(self.granted) < len(self.participants):
            return []
        self._go(State.PREPARING, now + self.startup_timeout_s)
        return [Order(stage.node, self._prepare(stage.stage)) for stage in self.claim.stages]

    def _reported(self, peer: NodeId, report: Progress | Ready | Connected | Failed, now: float) -> list[RunOrder]:
        match report:
            case Progress():
                self.stages[report.stage] = report.phase
                if self.progress.get(report.stage) != report and self.state is State.PREPARING:
                    self.deadline = now + self.startup_timeout_s
                self.progress[report.stage] = report
                return []
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
                return self._end(_told(report.reason), _told(report.message), peer)
            case _:
                assert_never(report)

    def _prepare(self, stage: int) -> Prepare:
        claim, hops, count = self.claim, self.hops, len(self.claim.stages)
        nodes = [claimed.node for claimed in claim.stages]
        above = hops.names[stage - 1] if stage else hops.names[count]
        below = hops.names[stage + 1]
        return Prepare(
            fence=self.fence,
            deployment=claim.deployment,
            manifest_digest=claim.manifest_digest,
            source=self.source,
            stage=stage,
            stages=count,
            first=claim.stages[stage].first,
            last=claim.stages[stage].last,
            layers=claim.layers,
            options=claim.options,
            upstream=Hop(hops.tokens[stage], above, nodes[stage - 1] if stage else claim.coordinator),
            downstream=Hop(hops.tokens[stage + 1], below, nodes[stage + 1] if stage + 1 < count else claim.coordinator),
        )

    def _nodes_not(self, state: str) -> list[NodeId]:
        return [stage.node for stage in self.claim.stages if self.stages.get(stage.stage) != state]

    def _go(self, state: State, deadline: float | None) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state} -> {state}"
        self.state, self.deadline = state, deadline

    def _end(self, reason: str, message: str, node: NodeId | None = None, promised: int = 0) -> list[RunOrder]:
        if self.state is State.ENDED:
            return []
        opened, served = self.state in (State.CONNECTING, State.SERVING), self.state is State.SERVING
        self._go(State.ENDED, None)
        orders: list[RunOrder] = [CloseHead(self.fence)] if opened else []
        orders += [Order(participant, Abort(self.fence, reason)) for participant in self.participants]
        return [*orders, Ended(self.fence, reason, message, node, promised, served)]


def _told(text: str) -> str:
    """A participant's words as one printable line: they come to a terminal and a log."""
    return "".join(c if c.isprintable() else " " for c in text[:TEXT_CHARACTERS])
