"""The scheduler of one run: requests in, frames out, samples in, tokens out. Pure: `now` is an argument.

    submit / cancel / taken            from the API
    next_frames(now) -> frames         to send in this order, all of them, before anything else is asked
    frame_received(frame, now)         -> events for the consumers
    expire(now), deadline()            time-outs; call `expire` at `deadline()`

Always more than one microbatch in flight: every busy lane has its own row under way, so that with as many busy lanes
as stages no stage waits. Decode rows go before prefill chunks; chunks of all prompts share one window of as many
frames as there are stages, so that a row never waits for more than one chunk's trip; alone, a prompt has one more
under way, which hides the way back to the head.

Invariants: every accepted request ends exactly once (a token with `finish`, a `Failed`, or its cancel); a lane and its
cells are given back exactly once; positions of a lane are contiguous; nothing is counted as done before its answer.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice

from meshnode.core.serving.events import Event, Failed, Statistics, TokenReady
from meshnode.core.serving.microbatch import OPERATIONS, InFlight, Microbatch, Span
from meshnode.core.serving.options import RETRIES, UNREAD_TOKENS, ServingOptions
from meshnode.core.serving.prefixes import Kept, Prefixes, Reuse
from meshnode.core.serving.request import Alternative, Generation, Sampled
from meshnode.core.serving.room import Room
from meshnode.core.serving.sequence import UNSEATED, Phase, Sequence
from meshnode.errors import (
    InvalidRequest,
    MeshError,
    Overloaded,
    PeerError,
    PromptTooLong,
    StageError,
    TimedOut,
    Unavailable,
)
from meshnode.wire.activation import Close, FailedFrame, Frame, LaneSample, Rows, SampledFrame
from meshnode.wire.fence import Fence
from meshnode.wire.limits import SCORED_ROWS
from meshnode.wire.sampling import GRAMMAR_REFUSED

_NOT_HELD = ("position_gap", "trim_refused", "bad_copy")
"""Reasons of a failure (docs/protocols/activation.md) when a stage has not what a lane was to begin with."""


class Scheduler:
    """Decides for one pipeline which rows go next. One object a run; after `lose` it refuses everything."""

    def __init__(self, options: ServingOptions, fence: Fence) -> None:
        self._options = options
        self._room = Room(options.context, options.lanes)
        self._prefixes = Prefixes(self._room, options.reuse)
        self._in_flight = InFlight(fence, options.end_tokens)
        self._all: dict[str, Sequence] = {}
        # Dicts as ordered sets: a cancel in the middle of a queue costs nothing.
        self._queue: dict[str, Sequence] = {}
        self._paused: dict[str, Sequence] = {}
        self._seated: dict[int, Sequence] = {}
        self._arrivals = 0
        self._seatings = 0
        self._chunks = 0
        self._refusal: str = ""
        self._filled = 0.0
        self._counts: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    # --- from the API -----------------------------------------------------------------------------------

    def submit(self, request: Generation, now: float) -> None:
        """Accept a request, or raise InvalidRequest, PromptTooLong, Overloaded or Unavailable at once."""
        assert request.prompt
        assert request.max_tokens >= 1
        if self._refusal:
            self._reject("draining", Unavailable(self._refusal))
        if request.id in self._all:
            self._reject("duplicate_id", InvalidRequest("a request of this id is running"))
        if len(request.prompt) >= self._options.context:
            self._reject("prompt_too_long", PromptTooLong(len(request.prompt), self._options.context))
        if not 0 <= min(request.prompt) <= max(request.prompt) < self._options.vocabulary:
            self._reject("token_range", InvalidRequest("the prompt holds an id outside of the vocabulary"))
        sequence = Sequence(request, self._arrivals, now)
        if (self._queue or not self._fits(sequence)) and len(self._queue) >= self._queue_most:
            self._reject("queue_full", Overloaded("all lanes are busy and the queue is full"))
        self._arrivals += 1
        self._all[request.id] = sequence
        self._queue[request.id] = sequence
        self._admit(now)

    def cancel(self, request_id: str, now: float) -> None:
        """End a request; its lane is free at once. Unknown and ended ids are fine."""
        sequence = self._all.get(request_id)
        if sequence is not None:
            self._counts["cancelled"] += 1
            self._end(sequence, keep=True)
            self._admit(now)

    def taken(self, request_id: str, now: float) -> bool:
        """The consumer took one token. True when its lane rested and has a row to send again."""
        sequence = self._all.get(request_id)
        if sequence is None:
            return False
        sequence.unread -= 1
        if sequence.unread != UNREAD_TOKENS - 1:
            return False
        sequence.since = now
        return True

    def drain(self, reason: str) -> None:
        """Refuse new requests as Unavailable; those that were accepted go on."""
        self._refusal = reason

    def limit_reuse(self, reuse: Reuse) -> None:
        """From now on use again no more than this of what ended requests left; what they left so far is freed.

        Prompts are counted from now on: those so far were the probe's, and would pass for what clients sent.
        """
        self._forget(reuse)
        self._counts["prompt"] = self._counts["cached"] = 0

    def lose(self, error: MeshError) -> list[Event]:
        """The pipeline is gone: every request ends with `error`, new ones are refused."""
        self._refusal = str(error)
        self._forget(Reuse.NONE)
        events: list[Event] = [self._failed(sequence, error) for sequence in list(self._all.values())]
        return events

    def _forget(self, reuse: Reuse) -> None:
        self._in_flight.operate(self._prefixes.drop_all())
        self._prefixes.reuse = reuse

    # --- from the pipeline ------------------------------------------------------------------------------

    def next_frames(self, now: float) -> list[Rows]:
        """Frames to send now, in this order. Empty when everything waits for answers."""
        if self._queue or self._paused:
            self._admit(now)
        frames: list[Rows] = []
        while self._in_flight.operations > OPERATIONS:
            frames.append(self._in_flight.frame([], 0, self._seatings))
        frames += self._decode_frames()
        frames += self._chunk_frames()
        if not frames and self._in_flight.operations:
            frames.append(self._in_flight.frame([], 0, self._seatings))
        return frames

    def frame_received(self, frame: Frame, now: float) -> list[Event]:
        """Take an answer of the last stage. Raises PeerError when it is not an answer to what was asked."""
        match frame:
            case SampledFrame(fence, number, samples):
                return self._sampled(self._in_flight.answered(fence, number), samples, now)
            case FailedFrame(fence, number):
                return self._failed_frame(frame, self._in_flight.answered(fence, number), now)
            case Rows():
                raise PeerError("the last stage sent rows to the head")
            case _:
                return []

    def expire(self, now: float) -> list[Event]:
        """End what waited too long: in the queue for a lane, or on a lane for a token."""
        events: list[Event] = []
        wait, patience = self._options.queue_wait_s, self._patience_s
        for sequence in [s for s in self._queue.values() if s.since + wait <= now]:
            self._rejected["queue_timeout"] += 1
            events.append(self._failed(sequence, Overloaded(f"no lane became free in {wait:g} s")))
        for sequence in [s for s in self._seated.values() if s.since + patience <= now and not _rests(s)]:
            events.append(self._failed(sequence, TimedOut(f"no token for {patience:g} s")))
        self._admit(now)
        return events

    def deadline(self) -> float | None:
        """When `expire` has something to do, as far as is known now: answers make it earlier or later."""
        queued = min((s.since for s in self._queue.values()), default=None)
        seated = min((s.since for s in self._seated.values() if not _rests(s)), default=None)
        times = [] if queued is None else [queued + self._options.queue_wait_s]
        times += [] if seated is None else [seated + self._patience_s]
        return min(times, default=None)

    def look(self) -> None:
        """Sample how many stages have work, for the statistics; to be called at even intervals."""
        if not all(map(_rests, self._seated.values())):
            self._counts["looks"] += 1
            self._filled += min(len(self._in_flight) / self._options.stages, 1.0)

    def statistics(self) -> Statistics:
        """Counters and gauges, for readers."""
        options, counts = self._options, self._counts
        return Statistics(
            lanes=options.lanes,
            lanes_busy=len(self._seated),
            queued=len(self._queue),
            paused=len(self._paused),
            context=options.context,
            cells_reserved=options.context - self._room.free_cells - self._prefixes.cells,
            cells_live=sum(s.sent for s in self._seated.values()),
            in_flight=len(self._in_flight),
            in_flight_most=self._in_flight.most,
            prompt_tokens=counts["prompt"],
            generated_tokens=counts["generated"],
            microbatches=self._in_flight.number,
            finished=counts["finished"],
            failed=counts["failed"],
            cancelled=counts["cancelled"],
            pauses=counts["pauses"],
            lanes_kept=len(self._prefixes),
            cells_kept=self._prefixes.cells,
            cached_tokens=counts["cached"],
            looks=counts["looks"],
            looks_filled=self._filled,
            rejected=dict(self._rejected),
        )

    # --- seats ------------------------------------------------------------------------------------------

    @property
    def _queue_most(self) -> int:
        return self._options.queue_per_lane * self._options.lanes

    @property
    def _patience_s(self) -> float:
        return self._options.token_timeout_s + self._options.row_patience_s * self._in_flight.rows

    def _reject(self, reason: str, error: MeshError) -> None:
        self._rejected[reason] += 1
        raise error

    def _fits(self, sequence: Sequence) -> int:
        """Cells to reserve if the sequence can be seated now, else 0.

        What was never paused may start with less than it might need; it is the youngest, so it is the first to be
        paused. What was paused comes back when its whole need is free, so that nobody is paused again and again.
        """
        lanes = self._room.free_lanes + len(self._prefixes)
        if not lanes or (self._paused and sequence.phase is not Phase.PAUSED):
            return 0
        left = sequence.request.max_tokens - sequence.generated
        whole = min(len(sequence.ids) + min(left, self._options.answer_reserve), self._options.context)
        least = min(len(sequence.ids) + min(left, self._options.growth), self._options.context)
        free = self._room.free_cells + self._prefixes.cells
        if free >= whole:
            return whole
        return least if free >= least and sequence.phase is not Phase.PAUSED else 0

    def _admit(self, now: float) -> None:
        for waiting in (self._paused, self._queue):
            while waiting:
                sequence = next(iter(waiting.values()))
                cells = self._fits(sequence)
                if not cells:
                    break
                del waiting[sequence.request.id]
                self._seatings += 1
                owner = None if sequence.fresh else sequence.owner
                grain = self._options.chunk if sequence.request.repeatable else 0
                seat = self._prefixes.seat(sequence.ids, owner, cells, self._live(owner), grain)
                self._in_flight.operate(seat.operations)
                sequence.lane, sequence.reserved = seat.lane, cells
                sequence.seating, sequence.phase, sequence.since = self._seatings, Phase.SEATED, now
                sequence.opened, sequence.sent, sequence.cached = False, seat.rows, seat.rows
                sequence.begun, sequence.exact, sequence.prefilled = seat.rows, seat.exact, len(sequence.ids)
                self._seated[sequence.lane] = sequence

    def _live(self, owner: str | None) -> list[Kept]:
        """What the lanes of an owner's other requests hold for certain."""
        if owner is None or not self._seated:
            return []
        answered = self._in_flight.answered_rows()
        same = (s for s in self._seated.values() if s.owner == owner)
        return [self._held(s, answered.get(s.seating, s.sent), owner) for s in same]

    def _held(self, sequence: Sequence, rows: int, owner: str) -> Kept:
        chunk = sequence.request.chunk or self._options.chunk
        exact = sequence.exact_rows(rows, chunk) if chunk == self._options.chunk else 0
        return Kept(sequence.lane, sequence.ids[:rows], owner, exact)

    def _unseat(self, sequence: Sequence, *, keep: bool = False) -> None:
        lane, owner = sequence.lane, sequence.owner
        del self._seated[lane]
        if keep and owner is not None and sequence.sent:
            rows = self._in_flight.answered_rows().get(sequence.seating, sequence.sent)
            self._in_flight.operate(self._prefixes.keep(self._held(sequence, rows, owner), sequence.sent))
        else:
            self._room.give_back(lane)
            if sequence.opened or sequence.sent:
                self._in_flight.operate((Close(lane),))
        # No frame of the seating is current any more; what comes back for it is ignored.
        sequence.lane, sequence.seating, sequence.reserved = UNSEATED, 0, 0

    def _pause(self, sequence: Sequence) -> None:
        self._unseat(sequence)
        sequence.phase = Phase.PAUSED
        self._counts["pauses"] += 1
        self._paused[sequence.request.id] = sequence
        if len(self._paused) > 1:
            # Rare and short (at most one entry a lane): the oldest comes back first.
            self._paused = dict(sorted(self._paused.items(), key=lambda item: item[1].arrival))

    def _end(self, sequence: Sequence, *, keep: bool = False) -> None:
        del self._all[sequence.request.id]
        if sequence.phase is Phase.SEATED:
            self._unseat(sequence, keep=keep)
        else:
            (self._queue if sequence.phase is Phase.QUEUED else self._paused).pop(sequence.request.id)
        sequence.phase = Phase.ENDED

    def _failed(self, sequence: Sequence, error: MeshError) -> Failed:
        self._counts["failed"] += 1
        self._end(sequence)
        return Failed(sequence.request.id, error)

    # --- frames -----------------------------------------------------------------------------------------

    def _decode_frames(self) -> list[Rows]:
        """One row of each lane that has its next token: together only where that was measured to pay."""
        ready: list[Sequence] = []
        for sequence in list(self._seated.values()):
            waits = sequence.pending == 1 and sequence.unread < UNREAD_TOKENS
            # Making room for one may pause another, before or behind it in this list.
            if not waits or sequence.phase is not Phase.SEATED:
                continue
            if sequence.sent < sequence.reserved or self._make_room(sequence):
                ready.append(sequence)
        frames: list[Rows] = []
        known: list[Sequence] = []
        for sequence in ready:
            if sequence.phase is not Phase.SEATED:
                continue
            if sequence.opened:
                known.append(sequence)
            else:  # A frame holds one Open at most: 64 of the largest would pass the frame's limit.
                frames.append(self._in_flight.frame([sequence], 1, self._seatings))
        spread = -(-len(self._seated) // self._options.stages)
        size = min(self._options.rows_per_microbatch, spread)
        while known and (len(known) >= size or self._in_flight.decodes < self._options.stages):
            rows, known = known[:size], known[size:]
            frames.append(self._in_flight.frame(rows, 1, self._seatings))
        return frames

    def _chunk_frames(self) -> list[Rows]:
        """Chunks of prompts in turn, as many under way as the window allows."""
        frames: list[Rows] = []
        prompts = [s for s in self._seated.values() if s.pending > 1]
        window = self._options.stages + (len(self._seated) == 1)
        while prompts and self._in_flight.chunks < window:
            sequence = min(prompts, key=lambda s: s.chunked)
            self._chunks += 1
            sequence.chunked = self._chunks
            rows = min(self._options.chunk, sequence.request.chunk or self._options.chunk)
            rows = min(rows, SCORED_ROWS) if sequence.request.scored else rows
            frames.append(self._in_flight.frame([sequence], rows, self._seatings, chunk=True))
            prompts = [s for s in prompts if s.pending > 1]
        return frames

    def _make_room(self, sequence: Sequence) -> bool:
        """A cell for the next row: of what ended requests left, or of the youngest lane, which is paused; False when
        that is this one itself."""
        while not (more := self._room.grow(sequence.lane, self._options.growth)):
            if operations := self._prefixes.drop_oldest():
                self._in_flight.operate(operations)
                continue
            youngest = max(self._seated.values(), key=lambda s: s.arrival)
            self._pause(youngest)
            if youngest is sequence:
                return False
        sequence.reserved += more
        return True

    # --- answers ----------------------------------------------------------------------------------------

    def _sampled(self, microbatch: Microbatch, samples: tuple[LaneSample, ...], now: float) -> list[Event]:
        if len(samples) != microbatch.samples:
            raise PeerError("the last stage sampled other rows than were asked for")
        events: list[Event] = []
        drawn = iter(samples)
        for span in microbatch.spans:
            current = span.current
            if current:
                span.sequence.since = now
                self._counts["prompt"] += span.rows if microbatch.chunk else 0
            if span.scored:
                self._scored(span, list(islice(drawn, span.scored)))
            if not span.logits:
                continue
            sample = next(drawn)
            if sample.lane != span.lane or sample.position != span.position + span.rows - 1:
                raise PeerError("the last stage sampled another row than was asked for")
            if sample.token >= self._options.vocabulary:
                raise PeerError("the last stage sampled a token outside of the vocabulary")
            if current:
                events.append(self._token(span, sample))
        return events

    def _scored(self, span: Span, samples: list[LaneSample]) -> None:
        """Keep the scores of a prompt's rows until its first token is known."""
        scores, prompt = span.sequence.scores, span.sequence.request.prompt
        first = span.position + span.rows - span.logits - span.scored
        for position, sample in enumerate(samples, first):
            asked = (sample.lane, sample.position, sample.token) == (span.lane, position, prompt[position + 1])
            if not asked or sample.logprob is None:
                raise PeerError("the last stage scored another row or token than was asked for, or did not")
        if span.current:
            assert len(scores) == first
            scores += [Sampled(each.token, each.logprob, _alternatives(each)) for each in samples]

    def _token(self, span: Span, sample: LaneSample) -> TokenReady:
        sequence, request = span.sequence, span.sequence.request
        self._counts["generated"] += 1
        finish = ""
        if sample.token in self._options.end_tokens and not request.sampling.ignore_eos:
            finish = "stop"
        elif sequence.generated + 1 == request.max_tokens or sequence.sent == self._options.context:
            finish = "length"
        alternatives = _alternatives(sample) if sample.alternatives else ()
        prompt = tuple(sequence.scores) if sequence.scores and not sequence.generated else ()
        cached = 0
        if sequence.cached and not sequence.generated:
            cached, sequence.cached = sequence.cached, 0
            self._counts["cached"] += cached
        if finish:
            self._counts["finished"] += 1
            self._end(sequence, keep=True)
        else:
            sequence.ids.append(sample.token)
            sequence.unread += 1
        return TokenReady(request.id, Sampled(sample.token, sample.logprob, alternatives, finish, prompt, cached))

    def _failed_frame(self, frame: FailedFrame, microbatch: Microbatch, now: float) -> list[Event]:
        """End the lanes at fault; others of the microbatch are computed again from their ids."""
        failure = frame.failure
        named = [self._seated[lane] for lane in failure.lanes if lane in self._seated]
        guilty = {s.request.id: s for s in named if s.seating <= microbatch.seatings}
        for lane in {*failure.lanes, *(span.lane for span in microbatch.spans)}:
            if lane in self._prefixes:
                self._in_flight.operate(self._prefixes.drop(lane))
        if failure.reason in _NOT_HELD and (misled := [s for s in guilty.values() if s.cached]):
            # No fault of theirs: they are computed from their ids, and whatever else is kept is not trusted either.
            self._in_flight.operate(self._prefixes.drop_all())
            for sequence in misled:
                del guilty[sequence.request.id]
                sequence.fresh = True
                self._pause(sequence)
        if not failure.lanes:
            guilty = {s.sequence.request.id: s.sequence for s in microbatch.spans if s.current}
        error: MeshError = StageError(failure.reason, f"stage {failure.stage}: {failure.message}")
        if failure.reason == GRAMMAR_REFUSED:
            error = InvalidRequest(f"the answer cannot go on as was asked: {failure.message}")
        # A client's grammar says nothing about the stage, and it ends its own request: the others go on as often.
        counts = failure.reason != GRAMMAR_REFUSED or not guilty
        events: list[Event] = [self._failed(sequence, error) for sequence in guilty.values()]
        for span in microbatch.spans:
            if not span.current:
                continue
            span.sequence.retries += counts
            if span.sequence.retries > RETRIES:
                events.append(self._failed(span.sequence, error))
            else:
                self._pause(span.sequence)
        self._admit(now)
        return events


def _alternatives(sample: LaneSample) -> tuple[Alternative, ...]:
    return tuple([Alternative(token, logprob) for token, logprob in sample.alternatives])


def _rests(sequence: Sequence) -> bool:
    """Whether the consumer lags so far behind that the lane waits for it."""
    return sequence.unread >= UNREAD_TOKENS
