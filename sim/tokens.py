"""The stand-in for llama.cpp: what a layer gives is a hash of the layer, the position, what it saw before on this lane
and what came from below.

The scheduler is the real one (core/serving). A token that is lost, doubled or out of order, or computed on another
lane's or run's cache, changes every token behind it; what must come out is computed apart by `answer`, which knows
neither lanes nor slices.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from meshnode.core.serving.events import Event, Failed, TokenReady
from meshnode.core.serving.options import ServingOptions
from meshnode.core.serving.request import Generation
from meshnode.core.serving.scheduler import Scheduler
from meshnode.errors import Overloaded, PeerError, StageLost
from meshnode.identity.ids import NodeId
from meshnode.wire.activation import (
    AnyOperation,
    Close,
    Copy,
    FailedFrame,
    Failure,
    LaneSample,
    Open,
    Rows,
    SampledFrame,
    Trim,
    changes_of,
)
from meshnode.wire.fence import Fence
from meshnode.wire.messages import Claim
from meshnode.wire.sampling import Sampling

if TYPE_CHECKING:
    from sim.machine import Machine

VOCABULARY = 1000
_MASK = 2**64 - 1
STEP_S = 0.002
"""A stage's decode of one row."""
POLL_S = 0.1
"""While a way is blocked, or a machine stands still."""
ASK_S = (0.5, 3.0)
PROMPT = 12
ANSWER = 8
CANCELLED = 0.1
"""Of the requests; their clients go away in the middle."""


def layer_gives(layer: int, position: int, before: int, below: int) -> int:
    """What `layer` passes on, and remembers: 64 bits, mixed as splitmix64 does (nobody here looks for collisions)."""
    mixed = (before ^ below * 0x9E3779B97F4A7C15 ^ (layer << 32 | position) * 0xC2B2AE3D27D4EB4F) & _MASK
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK
    return mixed ^ mixed >> 31


def token_of(value: int) -> int:
    """What the last layer's output is sampled to."""
    return value % VOCABULARY


def embedded(token: int) -> int:
    """What goes into the first layer."""
    return token + 1


def answer(prompt: tuple[int, ...], count: int, layers: int) -> list[int]:
    """The first `count` tokens behind `prompt`, by the whole model in one piece."""
    before, ids = [0] * layers, list(prompt)
    for position in range(len(prompt) + count - 1):
        value = embedded(ids[position])
        for layer in range(layers):
            before[layer] = value = layer_gives(layer, position, before[layer], value)
        if position >= len(prompt) - 1:
            ids.append(token_of(value))
    return ids[len(prompt) :]


@dataclass(frozen=True)
class Row:
    """One position of one lane on its way through the stages."""

    lane: int
    position: int
    logits: bool
    value: int


@dataclass(frozen=True)
class Batch:
    """One microbatch on its way."""

    fence: Fence
    number: int
    operations: tuple[AnyOperation, ...]
    rows: tuple[Row, ...]
    failure: Failure | None = None


class Slice:
    """One stage: its layers, and what they remember on each lane, position by position."""

    def __init__(self, index: int, first: int, last: int) -> None:
        self.index, self.layers = index, range(first, last)
        self.lanes: dict[int, list[list[int]]] = {}
        self.broken: set[int] = set()

    def compute(self, batch: Batch, *, fails: bool) -> Batch:
        """The microbatch with what this stage makes of it. Raises ValueError for rows that do not follow."""
        for operation in batch.operations:
            self._operate(operation)
        if batch.failure is not None:
            return batch
        used = {row.lane for row in batch.rows}
        self.broken |= used if fails else set()
        if guilty := tuple(sorted(self.broken & used)):
            failure = Failure(self.index, "fatal", "a decode failed", guilty, changes_of(batch.operations))
            return replace(batch, rows=(), failure=failure)
        return replace(batch, rows=tuple(self._row(row) for row in batch.rows))

    def _row(self, row: Row) -> Row:
        seen = self.lanes.get(row.lane)
        if seen is None or len(seen) != row.position:
            length = "closed" if seen is None else f"at {len(seen)}"
            raise ValueError(f"stage {self.index}: position {row.position} of lane {row.lane}, which is {length}")
        before = seen[-1] if seen else [0] * len(self.layers)
        value, now = row.value, []
        for layer, remembered in zip(self.layers, before, strict=True):
            value = layer_gives(layer, row.position, remembered, value)
            now.append(value)
        seen.append(now)
        return replace(row, value=value)

    def _operate(self, operation: AnyOperation) -> None:
        match operation:
            case Open():
                self.lanes[operation.lane] = self.lanes.get(operation.lane, [])[: operation.keep]
            case Trim():
                del self.lanes[operation.lane][operation.position :]
            case Copy():
                self.lanes[operation.target] = self.lanes[operation.source][: operation.length]
            case Close():
                self.lanes.pop(operation.lane, None)
        if not isinstance(operation, Copy):
            self.broken.discard(operation.lane)


@dataclass
class Hop:
    """A stream from one machine to the next: in order, nothing twice; it waits while the way is blocked."""

    source: NodeId
    target: NodeId
    clear_at: float = 0.0
    held: deque[Batch] = field(default_factory=deque)


class Pipeline:
    """A head with its clients, and the streams between its stages."""

    def __init__(self, machine: Machine, claim: Claim) -> None:
        self.machine, self.claim, self.fence = machine, claim, claim.fence
        self.world, self.random = machine.world, machine.random
        options, stages = claim.options, len(claim.stages)
        self.scheduler = Scheduler(
            ServingOptions(stages, options.context, VOCABULARY, lanes=options.lanes, chunk=options.chunk), claim.fence
        )
        nodes = [machine.node, *(stage.node for stage in claim.stages), machine.node]
        self.hops = [Hop(source, target) for source, target in pairwise(nodes)]
        self.open = self.asked = True

    # --- clients ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """From now on somebody asks now and then."""
        self.asked = True
        self.machine.after(self.random.uniform(*ASK_S), self._ask)

    def _ask(self) -> None:
        if not (self.open and self.asked):
            return
        self.begin()
        if self.machine.paused:
            return
        requests, draw = self.world.requests, self.random
        prompt = tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(1, PROMPT)))
        most = draw.randint(1, ANSWER)
        request = Generation(requests.new_id(), prompt, most, Sampling())
        try:
            self.scheduler.submit(request, self.world.now)
        except Overloaded:
            return
        requests.accepted(
            request.id, (self.claim.deployment, self.fence), answer(prompt, most, self.claim.layers), self.world.now
        )
        if draw.random() < CANCELLED:
            self.machine.after(draw.uniform(0.0, 0.5), lambda: self._cancel(request.id))
        self._send()

    def _cancel(self, request: str) -> None:
        if self.open:
            self.scheduler.cancel(request, self.world.now)
            self.world.requests.cancelled(request)
            self._send()

    def expire(self) -> None:
        """Time passed."""
        self._tell(self.scheduler.expire(self.world.now))
        self._send()

    def close(self) -> None:
        """The run is over: every request ends now."""
        self.open = False
        self._tell(self.scheduler.lose(StageLost("the run ended")))
        self.world.requests.all_ended(self.fence)

    def drain(self) -> None:
        """Take no more requests, unless it is to begin again; those under way go on."""
        self.asked = False

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        now = self.scheduler.statistics()
        return bool(now.lanes_busy or now.queued)

    def crashed(self) -> None:
        """The machine of head and clients died."""
        self.open = False
        self.world.requests.died(self.fence)

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case TokenReady():
                    self.world.requests.token(event.id, event.sampled, self.world.now)
                    if not event.sampled.finish:
                        self.scheduler.taken(event.id, self.world.now)
                case Failed():
                    self.world.requests.failed(event.id)

    # --- frames -------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        for frame in self.scheduler.next_frames(self.world.now):
            self._forward(0, self._batch(frame))

    def _batch(self, frame: Rows) -> Batch:
        assert frame.tokens is not None
        columns = zip(frame.lanes, frame.positions, frame.logits, frame.tokens, strict=True)
        rows = (
            Row(int(lane), int(position), bool(logits), embedded(int(token)))
            for lane, position, logits, token in columns
        )
        return Batch(frame.fence, frame.microbatch, frame.operations, tuple(rows))

    def _forward(self, index: int, batch: Batch) -> None:
        """Put `batch` on the stream to stage `index`; the one behind the last stage leads back to the head."""
        hop, agenda = self.hops[index], self.world.agenda
        delay = STEP_S
        if hop.source != hop.target:
            way = self.world.network.way(hop.source, hop.target)
            delay += way.delay() + way.resends()
        hop.clear_at = max(hop.clear_at, agenda.now + delay)
        agenda.at(hop.clear_at, lambda: self._arrived(index, batch))

    def _arrived(self, index: int, batch: Batch) -> None:
        hop = self.hops[index]
        hop.held.append(batch)
        if len(hop.held) == 1:
            self._deliver(index)

    def _deliver(self, index: int) -> None:
        hop = self.hops[index]
        while hop.held and self.open:
            host = self.world.machines[hop.target]
            blocked = hop.source != hop.target and self.world.network.way(hop.source, hop.target).blocked
            if blocked or host.paused:
                self.world.agenda.after(POLL_S, lambda: self._deliver(index))
                return
            self._take(index, host, hop.held.popleft())

    def _take(self, index: int, host: Machine, batch: Batch) -> None:
        if index == len(self.claim.stages):
            self._answered(batch)
            return
        stage = host.engine.stages.get(batch.fence, {}).get(index)
        if stage is None:
            return  # the process is gone, and the stream with it; heartbeats tell the head
        self.world.requests.computes(host, batch.fence)
        fails = bool(batch.rows) and host.random.random() < self.world.faults.step_failure
        try:
            computed = stage.compute(batch, fails=fails)
        except ValueError as error:
            self.world.checks.fail("tokens", f"{host.name} was given {error}")
            return
        self._forward(index + 1, computed)

    def _answered(self, batch: Batch) -> None:
        frame: FailedFrame | SampledFrame
        if batch.failure is not None:
            frame = FailedFrame(batch.fence, batch.number, batch.failure)
        else:
            drawn = (LaneSample(row.lane, row.position, token_of(row.value)) for row in batch.rows if row.logits)
            frame = SampledFrame(batch.fence, batch.number, tuple(drawn))
        try:
            events = self.scheduler.frame_received(frame, self.world.now)
        except PeerError as error:
            self.world.checks.fail("tokens", f"the head of {self.fence}: {error}")
            return
        self._tell(events)
        self._send()
