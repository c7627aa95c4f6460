"""One microbatch on one stage: what goes on, and that a failure changes nothing."""

import numpy as np

from meshnode.errors import StageError
from meshnode.io.stage.lanes import LaneTable
from meshnode.io.stage.meter import Meter
from meshnode.io.stage.step import Step
from meshnode.wire.activation import (
    HEADER_BYTES,
    Close,
    FailedFrame,
    Failure,
    Header,
    LaneSample,
    Open,
    Rows,
    SampledFrame,
    Score,
    decode,
)
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.rowcodec import Dtype
from meshnode.wire.sampling import Sampling
from tests.io.stage.test_lanes import Positions

FENCE = Fence(Term(1), RunId("0" * 16))
OPEN = (Open(0, Sampling(temperature=0.0)), Open(1, Sampling(temperature=0.0)))


class Doubler(Positions):
    """Activations times two; fails as told, after its cache has advanced, as llama.cpp may."""

    def __init__(self):
        super().__init__()
        self.error = None

    def decode(self, rows):
        self.advance(rows)
        if self.error:
            raise self.error
        with np.errstate(over="ignore"):
            return rows.activations * 2

    def rehearse(self, rows):
        self.rehearsed = rows
        if self.error:
            raise self.error


class FirstLogit:
    """Draws its one logit, to see which row it was given."""

    def draw(self, lane, position, logits):
        return LaneSample(lane, position, int(logits[0]))

    def score(self, lane, position, logits, target):
        if target > 100:
            raise StageError("bad_rows", "no such token")
        return LaneSample(lane, position, target, -float(logits[0]))


class Bench:
    """A step with its engine and lanes."""

    def __init__(self, last=False):
        self.engine, self.meter = Doubler(), Meter()
        self.table = LaneTable(self.engine, 4, 100, (lambda _: FirstLogit()) if last else None)
        self.step = Step(self.engine, self.table, self.meter, (1, last), Dtype.F32)

    def answer(self, frame):
        data = b"".join(self.step.answer(frame))
        return decode(Header.parse(data[:HEADER_BYTES]), data[HEADER_BYTES:])


def rows_of(*pairs, microbatch=1, operations=OPEN, logits=True, value=3.0):
    lanes, positions = [lane for lane, _ in pairs], [position for _, position in pairs]
    activations = np.full((len(pairs), 2), value, np.float32) if pairs else None
    return Rows(FENCE, microbatch, operations, positions, lanes, [logits] * len(pairs), None, activations)


def test_rows_go_on_with_their_operations_positions_and_flags():
    onward = Bench().answer(rows_of((0, 0), (1, 0)))
    assert isinstance(onward, Rows)
    assert (onward.microbatch, onward.operations) == (1, OPEN)
    assert (onward.lanes, onward.positions, onward.logits) == ((0, 1), (0, 0), [True, True])
    assert onward.activations.tolist() == [[6.0, 6.0], [6.0, 6.0]]


def test_operations_without_rows_go_on_alone():
    bench = Bench()
    onward = bench.answer(rows_of())
    assert (onward.operations, len(onward.positions)) == (OPEN, 0)
    assert bench.meter.microbatches == 0


def test_the_last_stage_draws_for_flagged_rows_in_their_order():
    bench = Bench(last=True)
    sampled = bench.answer(rows_of((1, 0), (0, 0)))
    assert sampled == SampledFrame(FENCE, 1, (LaneSample(1, 0, 6), LaneSample(0, 0, 6)))
    assert bench.meter.samples == 2


def test_a_lane_whose_next_token_cannot_be_told_fails_alone():
    bench = Bench(last=True)
    bench.answer(rows_of())

    class Refusing:
        def draw(self, lane, position, logits):
            raise StageError("grammar_refused", "nothing may follow")

    bench.table.samplers[1] = Refusing()
    failed = bench.answer(rows_of((0, 0), (1, 0), microbatch=2, operations=()))
    assert failed == FailedFrame(FENCE, 2, Failure(1, "grammar_refused", "nothing may follow", (1,), ()))
    assert bench.table.next_position == [0, 0, 0, 0]
    assert bench.engine.held == {0: 0, 1: 0}


def test_targets_are_scored_at_the_first_flagged_rows_of_their_lane_and_the_rest_are_drawn():
    bench = Bench(last=True)
    asked = rows_of((0, 0), (1, 0), (0, 1), (0, 2), operations=(*OPEN, Score(0, (7, 9)), Score(60, (1,))))
    assert bench.answer(asked).samples == (
        LaneSample(0, 0, 7, -6.0),
        LaneSample(1, 0, 6),
        LaneSample(0, 1, 9, -6.0),
        LaneSample(0, 2, 6),
    )
    later = bench.answer(rows_of((0, 3), microbatch=2, operations=()))
    assert later.samples == (LaneSample(0, 3, 6),), "targets are of their frame alone"


def test_a_target_outside_the_vocabulary_fails_its_microbatch_and_changes_nothing():
    bench = Bench(last=True)
    failed = bench.answer(rows_of((0, 0), (0, 1), operations=(*OPEN, Score(0, (7, 101)))))
    assert (failed.failure.reason, failed.failure.operations) == ("bad_rows", OPEN)
    assert (bench.table.next_position[0], bench.engine.held[0]) == (0, 0)


def test_targets_go_on_to_later_stages():
    operations = (*OPEN, Score(1, (5, 6)))
    assert Bench().answer(rows_of((1, 0), (1, 1), operations=operations)).operations == operations


def test_a_failed_decode_is_rolled_back_and_names_its_lanes_and_operations():
    bench = Bench()
    bench.engine.error = StageError("no_kv_room", "full")
    failed = bench.answer(rows_of((1, 0), (0, 0), (0, 1)))
    assert failed == FailedFrame(FENCE, 1, Failure(1, "no_kv_room", "full", (0, 1), OPEN))
    assert bench.table.next_position == [0, 0, 0, 0]
    assert bench.engine.held == {0: 0, 1: 0}
    bench.engine.error = None
    assert isinstance(bench.answer(rows_of((0, 0), (1, 0), microbatch=2, operations=())), Rows)


def test_activations_that_are_not_finite_fail_and_are_rolled_back():
    bench = Bench()
    bench.answer(rows_of((0, 0)))
    failed = bench.answer(rows_of((0, 1), microbatch=2, operations=(), value=3e38))
    assert failed.failure.reason == "non_finite"
    assert bench.engine.held[0] == 1


def test_more_rows_of_logits_than_the_context_was_made_for_fail_before_the_decode():
    bench = Bench(last=True)
    failed = bench.answer(rows_of(*[(0, position) for position in range(33)]))
    assert failed.failure.reason == "too_many_outputs"
    assert bench.meter.microbatches == 0
    many = rows_of(*[(0, position) for position in range(33)], microbatch=2, logits=False)
    assert isinstance(bench.answer(many), FailedFrame | SampledFrame)


def test_a_failure_from_upstream_passes_with_its_operations_done():
    bench = Bench()
    bench.answer(rows_of((0, 0)))
    frame = FailedFrame(FENCE, 2, Failure(0, "aborted", "too long", (1,), (Close(0),)))
    assert bench.answer(frame) == frame
    assert bench.answer(rows_of((0, 1), microbatch=3, operations=())).failure.reason == "lane_closed"


def test_costs_are_kept_by_the_number_of_rows():
    meter = Meter()
    for took in (1_000_000, 2_000_000):
        meter.computed(1, took)
    meter.computed(4, 9_000_000)
    assert meter.statistics(5, 7).cost_us == {1: 1100, 4: 9000}
    assert (meter.statistics(5, 7).id, meter.statistics(5, 7).cells_used) == (5, 7)
    assert (meter.microbatches, meter.rows, meter.compute_ns) == (3, 6, 12_000_000)


def test_a_rehearsal_changes_no_lane_and_refuses_in_silence_what_was_refused():
    bench = Bench()
    frame = rows_of((0, 0))
    bench.answer(frame)
    held = list(bench.table.next_position)
    bench.step.rehearse(frame)
    assert bench.engine.rehearsed is frame
    bench.engine.error = StageError("bad_rows", "a token outside the vocabulary")
    bench.step.rehearse(frame)
    bench.step.rehearse(FailedFrame(FENCE, 2, Failure(0, "non_finite", "", (0,), ())))
    assert bench.table.next_position == held
