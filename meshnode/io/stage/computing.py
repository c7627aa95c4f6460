"""The one thread that touches the engine: it loads, serves a pair of streams until they end, and unloads.

Invariant: jobs run one after the other; a job ends when its streams are interrupted, so whoever wants the thread
interrupts the streams first. Native code that does not come back from a step in time is aborted, and when that does
not help either, the process ends with EXIT_STUCK: the node can start another, a stuck thread cannot be cured.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, perf_counter_ns
from typing import Final

from meshnode.errors import LinkLost, PeerError, StaleFence
from meshnode.io.stage.lanes import LaneTable
from meshnode.io.stage.lease import StageLease
from meshnode.io.stage.meter import Meter
from meshnode.io.stage.step import Step
from meshnode.io.stage.streams import FrameReader, FrameSender, check_fence
from meshnode.io.stage.wiring import Engine, Wiring
from meshnode.wire.activation import FailedFrame, Header, Kind, Rows, decode
from meshnode.wire.fence import Fence
from meshnode.wire.rowcodec import WIRE_DTYPES, Dtype
from meshnode.wire.stage_protocol import DOWNSTREAM, UPSTREAM, Event, LoadStage

EXIT_STUCK: Final = 70
"""sysexits' EX_SOFTWARE."""
ABORT_GRACE_S: Final = 5.0
"""llama.cpp looks at its abort flag between graph nodes; the largest node of a 512-row chunk takes below 2 s."""
_LOOK_S = 0.25
_IDLE_NS: Final = 1_000_000
"""Of waiting for a frame: ten times a rehearsal, a fraction of any step of other stages."""
_FROM_UPSTREAM = (Kind.ROWS, Kind.FAILED, Kind.HEARTBEAT)

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Hops:
    """The two streams of a stage under one fence. `interrupt` may come from any thread."""

    fence: Fence
    reader: FrameReader
    sender: FrameSender
    wanted: bool = True
    """False when this stage itself ended them: then nobody is told of a loss."""
    broken: str = UPSTREAM
    """Which side went first."""

    def interrupt(self) -> None:
        """End them on purpose."""
        self.wanted = False
        self.reader.interrupt()
        self.sender.interrupt()

    def downstream_broke(self) -> None:
        """The writer's thread found its stream broken: wake the reader."""
        self.broken = DOWNSTREAM
        self.reader.interrupt()


class Loaded:
    """A slice that runs here, with its lanes and counters."""

    def __init__(self, what: LoadStage, engine: Engine, wiring: Wiring) -> None:
        self.what, self.engine, self.meter = what, engine, Meter()
        options = what.options
        self.first, self.last = what.stage == 0, what.stage == what.stages - 1
        make = (lambda opened: wiring.make_sampler(opened, engine.vocabulary)) if self.last else None
        self.table = LaneTable(engine, options.lanes, options.context, make)
        self.step = Step(engine, self.table, self.meter, (what.stage, self.last), WIRE_DTYPES[options.wire_dtype])


class Computing:
    """The computing thread and the watch over it."""

    def __init__(self, lease: StageLease) -> None:
        self._lease = lease
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._step_began: float | None = None
        self._steps = 0
        self._loaded: Loaded | None = None
        self._hops: Hops | None = None

    def start(self) -> None:
        """Start both threads; they end with the process."""
        threading.Thread(target=self._run, name="stage-compute", daemon=True).start()
        threading.Thread(target=self._watch, name="stage-watch", daemon=True).start()

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` on the computing thread, after those before it. A job handles its own errors."""
        self._jobs.put(job)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except BaseException:
                # A defect of ours: the state of the lanes is unknown, so is the engine's.
                log.exception("the computing thread failed")
                os._exit(EXIT_STUCK)

    def serve(self, loaded: Loaded, hops: Hops) -> Event | None:
        """On the computing thread: answer frames until a stream ends, close both, and say why if nobody wanted it."""
        self._loaded, self._hops = loaded, hops
        kind, message = "", ""
        try:
            self._serve(loaded, hops)
        except LinkLost as error:
            kind, message = "neighbour_lost", str(error)
        except StaleFence as error:
            kind, message = "stale_frame", str(error)
        except PeerError as error:
            kind, message = "bad_frame", str(error)
        finally:
            self._loaded = self._hops = None
            hops.reader.close()
            hops.sender.close()
        log.info("%s: %s", kind, message)
        return Event(kind=kind, message=message, side=hops.broken) if hops.wanted else None

    def _serve(self, loaded: Loaded, hops: Hops) -> None:
        gate, step, meter = _Gate(loaded, hops.fence), loaded.step, loaded.meter
        while True:
            asked = perf_counter_ns()
            header, body = hops.reader.read(gate.check)
            if header.kind is Kind.HEARTBEAT:
                continue
            began, computed = perf_counter_ns(), meter.compute_ns
            frame = decode(header, body)
            assert isinstance(frame, Rows | FailedFrame), "the gate lets nothing else through"
            self._step_began = monotonic()
            try:
                # Who interrupts says so first and aborts then; between the two there is no step that nobody ends.
                if not hops.wanted:
                    raise LinkLost("the streams were ended")
                if self._lease.over:
                    raise StaleFence("a frame came after the lease of its run had ended")
                buffers = step.answer(frame)
            finally:
                self._step_began, self._steps = None, self._steps + 1
            try:
                hops.sender.send(header.microbatch, buffers)
            except LinkLost:
                hops.broken = DOWNSTREAM
                raise
            meter.bytes_in += header.body_bytes
            meter.bytes_out += sum(map(len, buffers))
            meter.overhead_ns += perf_counter_ns() - began - (meter.compute_ns - computed)
            if header.rows == 1 and began - asked > _IDLE_NS:
                # One stream decodes, and the next row is as far away: the way in, which the weights have just flushed
                # out of the caches, is walked once more for nothing. Where frames queue, nobody waits for that.
                step.rehearse(decode(header, body))

    def abort(self) -> None:
        """End the running step, if any."""
        if self._step_began is not None and self._loaded is not None:
            self._loaded.engine.abort()

    def _watch(self) -> None:
        pause = threading.Event()
        while True:
            pause.wait(_LOOK_S)
            loaded, hops = self._loaded, self._hops
            if loaded is None:
                continue
            deadline_s = loaded.what.step_deadline_ms / 1000
            if hops is not None:
                hops.reader.expire(loaded.what.silence_ms / 1000)
                hops.sender.expire(deadline_s)
            began, number = self._step_began, self._steps
            if began is None or monotonic() - began < deadline_s:
                continue
            log.error("a step runs for %.1f s, its deadline has passed: aborting it", monotonic() - began)
            loaded.engine.abort()
            pause.wait(ABORT_GRACE_S)
            if self._step_began is not None and self._steps == number:
                log.error("the step cannot be aborted: native code does not return; ending the process")
                logging.shutdown()
                os._exit(EXIT_STUCK)


class _Gate:
    """What a frame from upstream must be before its body is even read."""

    def __init__(self, loaded: Loaded, fence: Fence) -> None:
        self._fence = fence
        self._first = loaded.first
        self._width = 1 if loaded.first else loaded.engine.width
        self._rows = loaded.what.options.chunk
        self._next = 1

    def check(self, header: Header) -> None:
        """Raise StaleFence or PeerError."""
        check_fence(header, self._fence)
        if header.kind not in _FROM_UPSTREAM:
            raise PeerError(f"a {header.kind.name} frame does not come from upstream")
        if header.kind is Kind.HEARTBEAT:
            return
        if header.microbatch != self._next:
            raise PeerError(f"microbatch {header.microbatch} came, {self._next} was next: replayed or lost")
        if header.rows and (
            header.width != self._width or header.rows > self._rows or (header.dtype is Dtype.TOKENS) is not self._first
        ):
            raise PeerError(f"{header.rows} rows x {header.width} as {header.dtype.name} do not fit this stage")
        # It is answered, or the stream ends.
        self._next += 1
