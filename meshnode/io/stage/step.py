"""One microbatch on one stage: lane operations, checks, decode, and the frame that goes on.

    ROWS -> ROWS (a later stage follows) | SAMPLED (this is the last) | FAILED
    FAILED -> FAILED (its lane operations are done here too)

Invariant: exactly one frame goes out for each that comes in, and a failure leaves every lane where it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from meshnode.errors import StageError
from meshnode.io.stage.lanes import LaneTable, RowsRefused
from meshnode.io.stage.meter import Meter
from meshnode.io.stage.wiring import Engine
from meshnode.wire.activation import (
    FailedFrame,
    Failure,
    Frame,
    LaneSample,
    Rows,
    SampledFrame,
    Score,
    changes_of,
    encode,
)
from meshnode.wire.limits import SCORED_ROWS
from meshnode.wire.rowcodec import Dtype

_MESSAGE_CHARACTERS = 1024

Buffers = Sequence[bytes | memoryview]


class Step:
    """Computes microbatches; all calls on one thread. `stage` is the last one when `last`."""

    def __init__(self, engine: Engine, table: LaneTable, meter: Meter, place: tuple[int, bool], dtype: Dtype) -> None:
        self.stage, self.last = place
        self._engine = engine
        self._table = table
        self._meter = meter
        self._dtype = dtype
        self._logit_rows = max(len(table.next_position), SCORED_ROWS)

    def answer(self, frame: Rows | FailedFrame) -> Buffers:
        """The bytes to send downstream; they may alias what the next call overwrites."""
        if isinstance(frame, FailedFrame):
            self._table.apply(frame.failure.operations)
            return encode(frame)
        if frame.operations:
            self._table.apply(frame.operations)
        try:
            after = self._table.check(frame)
            if self.last and len(frame.logits) > self._logit_rows:
                self._check_outputs(frame)
        except StageError as error:
            return self._failed(frame, error)
        if not after:
            return self._onward(frame, None)
        try:
            started = perf_counter_ns()
            computed = self._engine.decode(frame)
            self._meter.computed(len(frame.positions), perf_counter_ns() - started)
            buffers = self._onward(frame, computed)
        except StageError as error:
            self._table.roll_back(after)
            return self._failed(frame, error)
        self._table.commit(after)
        return buffers

    def rehearse(self, frame: Frame) -> None:
        """Walk the way of an answered frame up to the decode once more; nothing is computed, and no lane changes."""
        if isinstance(frame, Rows):
            # Rows that were refused are refused again.
            with suppress(StageError):
                self._engine.rehearse(frame)

    def _check_outputs(self, frame: Rows) -> None:
        wanted = sum(frame.logits)
        if wanted > self._logit_rows:
            raise StageError("too_many_outputs", f"{wanted} rows want logits, at most {self._logit_rows} can have them")

    def _onward(self, frame: Rows, computed: NDArray[np.float32] | None) -> Buffers:
        if self.last:
            samples = () if computed is None else self._sample(frame, computed)
            return encode(SampledFrame(frame.fence, frame.microbatch, samples))
        onward = Rows(
            frame.fence,
            frame.microbatch,
            frame.operations,
            frame.positions,
            frame.lanes,
            frame.logits,
            None,
            computed,
        )
        return encode(onward, self._dtype)

    def _sample(self, frame: Rows, logits: NDArray[np.float32]) -> tuple[LaneSample, ...]:
        samples: list[LaneSample] = []
        # A frame without operations, which nearly every token is, has nothing to look for.
        targets = _targets(frame) if frame.operations else {}
        for lane, position, wanted in zip(frame.lanes, frame.positions, frame.logits, strict=True):
            if wanted:
                sampler = self._table.samplers[lane]
                assert sampler is not None, "an open lane of the last stage has a sampler"
                row = logits[len(samples)]
                if targets and (left := targets.get(lane)):
                    samples.append(sampler.score(lane, position, row, left.popleft()))
                    continue
                try:
                    samples.append(sampler.draw(lane, position, row))
                except StageError as error:
                    raise RowsRefused(error.reason, str(error), (lane,)) from None
        self._meter.samples += len(samples)
        return tuple(samples)

    def _failed(self, frame: Rows, error: StageError) -> Buffers:
        self._meter.failures += 1
        lanes = error.lanes if isinstance(error, RowsRefused) else tuple(sorted(set(frame.lanes)))
        message, changes = str(error)[:_MESSAGE_CHARACTERS], changes_of(frame.operations)
        failure = Failure(self.stage, error.reason, message, lanes, changes)
        return encode(FailedFrame(frame.fence, frame.microbatch, failure))


def _targets(frame: Rows) -> dict[int, deque[int]]:
    """By lane, what its first rows with logits are scored for."""
    return {each.lane: deque(each.targets) for each in frame.operations if isinstance(each, Score)}
