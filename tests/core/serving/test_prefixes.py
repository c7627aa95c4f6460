from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from meshnode.core.serving.prefixes import WORTH, Kept, Prefixes, Reuse, Seat, shared
from meshnode.core.serving.room import Room
from meshnode.errors import TimedOut
from meshnode.wire.activation import AnyOperation, Close, Copy, Open, Trim
from tests.core.serving.head import Head
from tests.core.serving.stages import answer

CONTEXT, LANES = 120, 3
SYSTEM = list(range(100, 130))


def prefixes(reuse=Reuse.ANY, lanes=LANES, context=CONTEXT) -> tuple[Prefixes, Room]:
    room = Room(context, lanes)
    return Prefixes(room, reuse), room


def leave(held: Prefixes, ids: list[int], owner="", sent=0) -> int:
    """A request of these ids came and went; on which lane it left them."""
    seat = held.seat(ids, None, len(ids) + 1)
    held.keep(Kept(seat.lane, ids, owner), sent or len(ids))
    return seat.lane


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 99, 100])
def test_the_common_prefix_is_as_long_as_it_is(length) -> None:
    ids = list(range(100))
    other = ids[:length] + [1000] * (100 - length)
    assert shared(ids, other) == shared(other, ids) == length
    assert shared(ids, other[:length]) == length


def test_the_next_turn_of_a_chat_continues_its_lane() -> None:
    held, room = prefixes()
    lane = leave(held, SYSTEM)
    seat = held.seat([*SYSTEM, 1, 2, 3], "", 40)
    assert seat == Seat(lane, len(SYSTEM))
    assert (room.free_cells, len(held), held.cells) == (CONTEXT - 40, 0, 0)


def test_one_row_is_always_computed() -> None:
    held, _ = prefixes(lanes=1)
    leave(held, SYSTEM)
    seat = held.seat(SYSTEM, "", 40)
    assert (seat.rows, seat.operations) == (29, (Trim(0, 29),))


def test_another_chat_with_the_same_beginning_copies_it_while_a_lane_is_empty() -> None:
    held, _ = prefixes()
    lane = leave(held, [*SYSTEM, 1, 1, 1])
    seat = held.seat([*SYSTEM, 2, 2, 2], "", 40)
    assert seat.rows == 30
    assert seat.operations == (Copy(lane, seat.lane, 30),)
    assert lane in held


def test_without_an_empty_lane_a_long_rest_is_not_cut_off_for_a_short_beginning() -> None:
    held, _ = prefixes(lanes=2, context=400)
    oldest = leave(held, [7] * 10)
    lane = leave(held, [*SYSTEM, *[1] * 100])
    seat = held.seat([*SYSTEM, 2], "", 40)
    assert seat == Seat(oldest, 30, (Close(oldest), Copy(lane, oldest, 30)))
    leave_first, _ = prefixes(lanes=2, context=400)
    leave(leave_first, [7] * 10)
    lane = leave(leave_first, [*SYSTEM, 1])
    assert leave_first.seat([*SYSTEM, 2], "", 40) == Seat(lane, 30, (Trim(lane, 30),)), "one row is cut off"


def test_the_beginning_of_a_request_under_way_is_copied_as_far_as_it_is_answered() -> None:
    held, room = prefixes()
    busy = room.take(40)
    seat = held.seat([*SYSTEM, 5], "", 40, [Kept(busy, SYSTEM[:20], "")])
    assert seat.operations == (Copy(busy, seat.lane, 20),)


def test_r84_one_owner_never_gets_what_another_left() -> None:
    held, _ = prefixes()
    leave(held, SYSTEM, "one")
    assert held.seat([*SYSTEM, 1], "other", 40).rows == 0
    assert held.seat([*SYSTEM, 1], None, 40).rows == 0
    assert held.seat([*SYSTEM, 1], "one", 40).rows == 30


def test_state_that_cannot_be_cut_is_used_whole_or_not_at_all() -> None:
    held, _ = prefixes(Reuse.WHOLE)
    leave(held, SYSTEM)
    assert held.seat([*SYSTEM[:-1], 1, 2], "", 33).rows == 0
    assert held.seat(SYSTEM, "", 32).rows == 0, "one row must be computed, and none can be taken back"
    cut, _ = prefixes(Reuse.WHOLE)
    leave(cut, SYSTEM, sent=31)
    assert len(cut) == 0, "a row that is not answered cannot be taken back either"
    cut, _ = prefixes(Reuse.WHOLE)
    leave(cut, SYSTEM)
    assert cut.seat([*SYSTEM, 1], "", 40).rows == 30


def test_the_lane_that_was_not_used_for_longest_goes_first() -> None:
    held, _ = prefixes()
    lanes = [leave(held, [number] * 10) for number in range(3)]
    assert held.seat([0] * 12, "", 20) == Seat(lanes[0], 10)
    assert held.seat([9] * 12, "", 20) == Seat(lanes[1], 0, (Close(lanes[1]),))


def test_a_lane_whose_beginning_was_copied_was_used() -> None:
    held, _ = prefixes(context=400)
    lanes = [leave(held, [*SYSTEM, 1]), leave(held, [7] * 10)]
    held.seat([*SYSTEM, 2], "", 40)
    assert held.seat([9] * 12, "", 20).operations == (Close(lanes[1]),)


@pytest.mark.parametrize(("cells", "dropped"), [(54, 0), (55, 1)])
def test_another_lane_is_dropped_only_when_its_cells_are_needed(cells, dropped) -> None:
    held, room = prefixes(context=64)
    lane, other = leave(held, SYSTEM), leave(held, [7] * 10)
    seat = held.seat([*SYSTEM, 1], "", cells)
    assert seat == Seat(lane, 30, (Close(other),) * dropped)
    assert room.free_cells + held.cells == 64 - cells


def test_too_little_is_not_kept() -> None:
    held, room = prefixes()
    leave(held, [1] * (WORTH - 1))
    assert (len(held), room.free_lanes) == (0, LANES)


class Lanes(RuleBasedStateMachine):
    """The decision beside stages that do only what they are told, and hold the ids themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.room = Room(CONTEXT, LANES)
        self.prefixes = Prefixes(self.room, Reuse.ANY)
        self.stage: dict[int, list[tuple[str, int]]] = {}
        self.busy: dict[int, tuple[str | None, list[int], int, int]] = {}

    @property
    def free(self) -> int:
        return self.room.free_cells + self.prefixes.cells

    def do(self, operations: tuple[AnyOperation, ...]) -> None:
        for operation in operations:
            match operation:
                case Close(lane):
                    assert lane not in self.busy
                    self.stage.pop(lane)
                case Trim(lane, position):
                    assert self.prefixes.reuse is Reuse.ANY
                    assert position < len(self.stage[lane])
                    del self.stage[lane][position:]
                case Copy(source, target, length):
                    assert target not in self.stage
                    assert 0 < length <= len(self.stage[source])
                    self.stage[target] = self.stage[source][:length]
                case Open():
                    raise AssertionError("the frame makes it")

    @rule(
        owner=st.sampled_from(["a", "b", None]),
        begins=st.sampled_from([0, 5, WORTH, 20, 30]),
        rest=st.lists(st.integers(0, 1), min_size=1, max_size=40),
        more=st.integers(1, 10),
        sent=st.integers(0, 60),
        grain=st.sampled_from([0, 0, 6]),
    )
    def request(self, owner, begins, rest, more, sent, grain) -> None:
        ids = SYSTEM[:begins] + rest
        cells = len(ids) + more
        if self.free < cells or not (self.room.free_lanes or len(self.prefixes)):
            return
        live = [
            Kept(lane, held[:known], "", known // 2)
            for lane, (who, held, known, _) in self.busy.items()
            if who == owner
        ]
        seat = self.prefixes.seat(ids, owner, cells, live, grain)
        assert seat.exact <= seat.rows
        assert not grain or (seat.rows % grain == 0 and seat.exact == seat.rows)
        self.do(seat.operations)
        assert seat.lane not in self.busy
        holds = self.stage.setdefault(seat.lane, [])
        assert [token for _, token in holds] == ids[: seat.rows], "what it begins with are its own first ids"
        assert all(who == owner for who, _ in holds)
        assert seat.rows < len(ids)
        assert owner is not None or not seat.rows
        sent = max(seat.rows, min(sent, len(ids)))
        holds += [(str(owner), token) for token in ids[seat.rows : sent]]
        self.busy[seat.lane] = (owner, ids, seat.rows, sent)

    @precondition(lambda self: self.busy)
    @rule(which=st.integers(0, LANES), answered=st.integers(0, 60))
    def end(self, which, answered) -> None:
        lane = sorted(self.busy)[which % len(self.busy)]
        owner, ids, known, sent = self.busy.pop(lane)
        if owner is None:
            self.room.give_back(lane)
            self.do((Close(lane),))
        else:
            rows = max(known, min(answered, sent))
            self.do(self.prefixes.keep(Kept(lane, ids[:rows], owner, rows // 2), sent))

    @precondition(lambda self: self.busy)
    @rule(which=st.integers(0, LANES))
    def grow(self, which) -> None:
        lane = sorted(self.busy)[which % len(self.busy)]
        while self.free and not self.room.grow(lane, 4):
            self.do(self.prefixes.drop_oldest())

    @rule(reuse=st.sampled_from(Reuse))
    def limit(self, reuse) -> None:
        self.do(self.prefixes.drop_all())
        self.prefixes.reuse = reuse

    @invariant()
    def no_lane_and_no_cell_is_lost_or_used_twice(self) -> None:
        assert self.room.free_lanes + len(self.prefixes) + len(self.busy) == LANES
        assert set(self.stage) == set(self.busy) | {lane for lane in range(LANES) if lane in self.prefixes}
        kept = sum(len(self.stage[lane]) for lane in self.stage if lane in self.prefixes)
        assert kept == self.prefixes.cells
        assert sum(map(len, self.stage.values())) <= CONTEXT - self.room.free_cells
        assert self.room.free_cells >= 0


TestLanes = Lanes.TestCase
TestLanes.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


# --- with the scheduler around it ------------------------------------------------------------------------------------


def test_a_second_turn_computes_only_what_is_new_and_says_so() -> None:
    head = Head()
    head.submit("first", range(1, 21), 10, owner="")
    head.run()
    said = head.tokens["first"]
    assert head.cached == {"first": 0}
    before = head.stages.computed
    again = (*range(1, 21), *said, 5, 6)
    head.submit("second", again, 4, owner="")
    head.run()
    assert head.tokens["second"] == answer(again, 4)
    # The last token of an answer was never fed.
    assert head.cached["second"] == 29
    assert head.stages.computed - before == len(again) - 29 + 3
    now = head.scheduler.statistics()
    assert (now.cached_tokens, now.lanes_kept, now.cells_kept) == (29, 1, len(again) + 3)


def test_the_rows_of_a_request_without_owner_are_neither_used_nor_left() -> None:
    head = Head()
    head.submit("first", range(1, 21), owner="")
    head.run()
    head.submit("second", range(1, 25))
    head.run()
    head.submit("third", range(1, 31), owner="")
    head.run()
    assert head.cached == {"first": 0, "second": 0, "third": 20}


def test_a_request_that_was_cancelled_leaves_what_was_answered() -> None:
    head = Head(stages=2)
    head.submit("gone", range(1, 101), owner="")
    head.send()
    head.step()
    head.scheduler.cancel("gone", 0)
    head.submit("next", range(1, 101), owner="")
    head.run()
    assert head.cached["next"] == head.options.chunk
    assert head.tokens["next"] == answer(tuple(range(1, 101)), 4)


def test_rows_that_fail_behind_a_cancel_take_their_lane_with_them() -> None:
    head = Head(stages=2)
    head.submit("gone", range(1, 101), owner="")
    head.send()
    head.step()
    head.scheduler.cancel("gone", 0)
    head.take(head.scheduler.frame_received(head.stages.fail_oldest(), 0))
    assert head.scheduler.statistics().lanes_kept == 0
    head.submit("next", range(1, 101), owner="")
    head.run()
    assert head.cached["next"] == 0
    assert head.tokens["next"] == answer(tuple(range(1, 101)), 4)


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_stage_that_does_not_hold_what_it_should_costs_time_and_never_an_answer(lanes) -> None:
    head = Head(lanes=lanes)
    head.stages.cuts = False
    head.submit("first", range(1, 31), owner="")
    head.run()
    head.submit("second", (*range(1, 21), 7, 7), owner="")
    head.run()
    assert head.tokens["second"] == answer((*range(1, 21), 7, 7), 4)
    assert head.cached["second"] == 0, "in the end every row was computed"
    assert head.ends["second"] == "length"


def test_cells_that_ended_requests_hold_are_given_to_who_needs_them() -> None:
    head = Head(context=600)
    for number in range(3):
        head.submit(f"r{number}", [number] * 150, 2, owner="")
        head.run()
    assert head.scheduler.statistics().cells_kept == 453
    head.submit("large", range(1, 301), 290, owner="")
    head.run()
    assert head.ends["large"] == "length"
    assert head.scheduler.statistics().pauses == 0


def test_an_answer_grows_into_cells_of_ended_requests_before_anybody_is_paused() -> None:
    head = Head(context=700, answer_reserve=16, growth=16)
    head.submit("old", [1] * 200, 2, owner="")
    head.run()
    head.submit("long", [2] * 100, 590, owner="")
    head.run()
    assert head.tokens["long"] == answer(tuple([2] * 100), 590)
    assert head.scheduler.statistics().pauses == 0


def test_what_a_request_of_another_owner_computes_right_now_is_not_copied() -> None:
    head = Head()
    head.submit("busy", range(1, 41), 50, owner="one")
    head.steps(8)
    head.submit("other", range(1, 41), owner="two")
    head.submit("same", range(1, 41), owner="one")
    head.run()
    assert (head.cached["other"], head.cached["same"]) == (0, 39)


def test_a_request_that_ends_before_its_first_frame_leaves_nothing_uncounted() -> None:
    head = Head(lanes=2)
    head.submit("first", range(1, 41), owner="")
    head.run()
    head.submit("late", (*range(1, 31), 7), owner="")
    head.take(head.scheduler.expire(1e6))
    assert isinstance(head.ends["late"], TimedOut)
    head.scheduler.limit_reuse(Reuse.NONE)
    head.run()
    assert head.stages.lanes == {}


def test_what_a_probe_asked_before_clients_are_served_is_not_counted_as_theirs() -> None:
    head = Head(lanes=2)
    for name in ("whole", "again"):
        head.submit(name, range(16), owner="probe")
        head.run()
    asked = head.scheduler.statistics()
    assert (asked.prompt_tokens, asked.cached_tokens) == (16, 15), "a single row goes with the decoding"
    head.scheduler.limit_reuse(Reuse.ANY)
    head.submit("client", range(16), owner="")
    head.run()
    told = head.scheduler.statistics()
    assert (told.prompt_tokens, told.cached_tokens) == (16, 0)


def test_a_request_that_was_paused_begins_with_what_another_left_and_tells_only_of_its_prompt() -> None:
    head = Head(context=700)
    head.submit("old", range(10), max_tokens=380, owner="")
    head.submit("young", range(5), max_tokens=600, owner="")
    head.run()
    assert head.scheduler.statistics().pauses == 1
    assert head.stages.opens[-1].keep == 5
    assert head.tokens == {"old": answer(tuple(range(10)), 380), "young": answer(tuple(range(5)), 600)}
    assert head.cached == {"old": 0, "young": 0}, "its first token came before"


def test_what_is_to_be_repeatable_begins_with_whole_chunks_of_prompts_only() -> None:
    prompt = tuple(range(1, 36))
    head = Head(lanes=2)
    head.submit("first", prompt, 10, owner="")
    head.run()
    said = (*prompt, *head.tokens["first"], 1, 2, 3)
    head.submit("exact", said, owner="", repeatable=True)
    head.run()
    assert head.cached["exact"] == 32, "four chunks of eight; the rest of the prompt shared its chunk with nothing"
    head.submit("again", said, owner="", repeatable=True)
    head.run()
    assert head.cached["again"] == 40, "the second one computed its own in the same chunks"
    head.submit("usual", (*prompt[:30], 1, *range(50)), owner="")
    head.run()
    assert head.cached["usual"] == 30
    head.submit("behind it", (*prompt[:30], 1, *range(60)), owner="", repeatable=True)
    head.run()
    assert head.cached["behind it"] == 24, "what follows a beginning that was cut lies in other chunks"


def test_clients_that_come_and_go_in_one_turn_make_no_frame_too_large() -> None:
    head = Head(lanes=4, context=4000)
    head.submit("first", range(1, 41), owner="")
    head.run()
    for number in range(200):
        head.submit(f"r{number}", (*range(1, 31), number), owner="")
        head.take(head.scheduler.expire(1e6))
    head.submit("last", range(1, 60), owner="")
    head.run()
    assert head.tokens["last"] == answer(tuple(range(1, 60)), 4)


def test_a_scored_prompt_is_computed_row_by_row_and_leaves_nothing() -> None:
    head = Head(chunk=64)
    head.submit("first", range(1, 41), owner="")
    head.run()
    head.submit("scored", range(1, 41), owner="", scored=True)
    head.run()
    assert head.cached["scored"] == 0
    assert len(head.scores["scored"]) == 39
    assert head.scheduler.statistics().lanes_kept == 1
