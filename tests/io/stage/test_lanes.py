"""Lanes of a stage: positions, operations and roll-back, with an engine that remembers only positions."""

import random

import pytest

from meshnode.errors import StageError
from meshnode.io.stage.lanes import LaneTable, RowsRefused
from meshnode.wire.activation import Close, Copy, Open, Rows, Trim
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.sampling import Sampling

FENCE = Fence(Term(1), RunId("0" * 16))
GREEDY = Sampling(temperature=0.0)


class Positions:
    """What llama.cpp keeps of a lane, without the numbers. `trims` False: a recurrent model."""

    def __init__(self, trims=True):
        self.held = {}
        self.trim_any = trims

    def advance(self, rows):
        for lane, position in zip(rows.lanes, rows.positions, strict=True):
            self.held[lane] = position + 1

    def next_position(self, lane):
        return self.held.get(lane, 0)

    def trim(self, lane, position):
        if self.trim_any:
            self.held[lane] = min(self.next_position(lane), position)
        return self.trim_any

    def clear(self, lane):
        self.held[lane] = 0

    def copy(self, source, target, length):
        if not self.trim_any and length != self.next_position(source):
            raise StageError("bad_copy", "only whole lanes")
        self.held[target] = length


def rows_of(*pairs):
    lanes, positions = [lane for lane, _ in pairs], [position for _, position in pairs]
    return Rows(FENCE, 1, (), positions, lanes, [True] * len(pairs), [0] * len(pairs))


def table_of(engine, *opened, samplers=None):
    table = LaneTable(engine, 4, 100, samplers)
    table.apply(tuple(Open(lane, GREEDY) for lane in opened))
    return table


def run(table, engine, *pairs):
    rows = rows_of(*pairs)
    after = table.check(rows)
    engine.advance(rows)
    table.commit(after)


def refusal(table, *pairs):
    with pytest.raises(RowsRefused) as caught:
        table.check(rows_of(*pairs))
    return caught.value.reason, caught.value.lanes


def test_rows_of_several_lanes_advance_each_by_its_own():
    engine = Positions()
    table = table_of(engine, 0, 2)
    run(table, engine, (0, 0), (0, 1), (2, 0), (0, 2))
    assert table.next_position == [3, 0, 1, 0]
    assert table.cells_used == 4


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        ((0, 1), "position_gap"),
        ((1, 0), "lane_closed"),
        ((4, 0), "lane_closed"),
    ],
    ids=["a gap", "a closed lane", "a lane beyond the run's"],
)
def test_rows_that_do_not_fit_are_refused_and_nothing_changes(pair, reason):
    table = table_of(Positions(), 0)
    assert refusal(table, pair) == (reason, (pair[0],))
    assert table.next_position == [0, 0, 0, 0]


def test_a_lane_at_the_end_of_the_context_is_refused():
    engine = Positions()
    table = table_of(engine, 0)
    run(table, engine, *[(0, position) for position in range(100)])
    assert refusal(table, (0, 100)) == ("no_kv_room", (0,))


def test_r92_an_opened_lane_starts_empty_whatever_it_held():
    engine = Positions()
    table = table_of(engine, 0)
    run(table, engine, (0, 0), (0, 1))
    table.apply((Open(0, GREEDY),))
    assert engine.held[0] == 0
    assert refusal(table, (0, 2))[0] == "position_gap"
    run(table, engine, (0, 0))


def test_a_lane_opened_on_a_prefix_keeps_it():
    engine = Positions()
    table = table_of(engine, 0)
    run(table, engine, *[(0, position) for position in range(6)])
    table.apply((Open(0, GREEDY, keep=4),))
    run(table, engine, (0, 4))
    table.apply((Copy(0, 3, 5), Open(3, GREEDY, keep=5)))
    run(table, engine, (3, 5))
    assert engine.held == {0: 5, 3: 6}


def test_operations_are_done_in_order_and_a_bad_one_condemns_only_its_lane():
    engine = Positions()
    table = table_of(engine, 0, 1)
    run(table, engine, (0, 0), (1, 0))
    table.apply((Trim(0, 5), Copy(1, 2, 9), Close(1), Open(1, GREEDY), Close(200)))
    assert refusal(table, (0, 0)) == ("position_gap", (0,))
    assert refusal(table, (2, 0)) == ("position_gap", (2,))
    run(table, engine, (1, 0))
    table.apply((Open(0, GREEDY),))
    run(table, engine, (0, 0))


def test_a_recurrent_model_cannot_be_trimmed_and_says_so_on_the_next_rows():
    engine = Positions(trims=False)
    table = table_of(engine, 0)
    run(table, engine, (0, 0), (0, 1), (0, 2))
    table.apply((Trim(0, 3),))
    run(table, engine, (0, 3))
    table.apply((Trim(0, 2),))
    assert refusal(table, (0, 2)) == ("trim_refused", (0,))
    table.apply((Open(0, GREEDY),))
    run(table, engine, (0, 0))


@pytest.mark.parametrize("trims", [True, False])
def test_r20_a_failed_decode_leaves_every_lane_at_its_agreed_position_or_empty(trims):
    engine = Positions(trims)
    table = table_of(engine, 0, 1)
    run(table, engine, (0, 0), (0, 1))
    rows = rows_of((0, 2), (1, 0), (1, 1))
    after = table.check(rows)
    engine.advance(rows)
    table.roll_back(after)
    assert (engine.held[0], engine.held[1]) == ((2, 0) if trims else (0, 0))
    assert table.next_position[:2] == [engine.held[0], 0]


def test_a_sampler_is_made_at_open_and_one_that_cannot_be_made_condemns_the_lane():
    def make(opened):
        if opened.sampling.logit_bias:
            raise StageError("bad_sampling", "outside the vocabulary")
        return object()

    table = table_of(Positions(), 0, samplers=make)
    assert table.samplers[0] is not None
    table.apply((Open(1, Sampling(logit_bias=((9, 1.0),))),))
    assert refusal(table, (1, 0)) == ("bad_sampling", (1,))
    table.apply((Close(0),))
    assert table.samplers[0] is None


def test_after_any_history_the_table_says_what_the_engine_holds():
    generator = random.Random(4)
    for trims in (True, False):
        engine = Positions(trims)
        table = LaneTable(engine, 4, 100, None)
        for _ in range(3000):
            lane, other, number = generator.randrange(5), generator.randrange(5), generator.randrange(8)
            choices = [Open(lane, GREEDY, keep=number * generator.randrange(2)), Trim(lane, number), Close(lane)]
            choices += [Copy(lane, other, number)] * (lane != other)
            table.apply(tuple(generator.sample(choices, generator.randrange(3))))
            rows = rows_of(*[(lane, number + index) for index in range(generator.randrange(1, 4))])
            try:
                after = table.check(rows)
            except RowsRefused:
                continue
            if generator.random() < 0.3:
                engine.advance(rows)
                table.roll_back(after)
            else:
                engine.advance(rows)
                table.commit(after)
            assert table.next_position == [engine.next_position(index) for index in range(4)]
