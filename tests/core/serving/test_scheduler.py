from __future__ import annotations

import msgspec
import pytest

from meshnode.core.serving.options import RETRIES, UNREAD_TOKENS
from meshnode.core.serving.request import Generation
from meshnode.errors import (
    InvalidRequest,
    Overloaded,
    PeerError,
    PromptTooLong,
    StageError,
    StageLost,
    TimedOut,
    Unavailable,
)
from meshnode.wire.activation import Heartbeat, LaneSample, SampledFrame
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.sampling import GRAMMAR_REFUSED, Sampling
from tests.core.serving.head import Head
from tests.core.serving.stages import END, FENCE, VOCABULARY, answer


def test_a_request_gets_its_tokens_and_its_lane_is_free_afterwards() -> None:
    head = Head()
    head.submit("a", max_tokens=4)
    head.run()
    assert head.tokens["a"] == answer((1, 2, 3), 4)
    assert head.ends == {"a": "length"}
    assert head.all_free()
    assert head.stages.lanes == {}


@pytest.mark.parametrize("count", [1, 2, 7])
def test_r16_generation_stops_at_exactly_max_tokens(count) -> None:
    head = Head()
    head.submit("a", max_tokens=count)
    head.run()
    assert len(head.tokens["a"]) == count


def test_a_token_that_ends_generation_finishes_with_stop() -> None:
    head = Head()
    head.submit("a")
    head.submit("b", ignore_eos=True)
    head.send()
    for name in ("a", "b"):
        frame = head.stages.answer_oldest()
        end = LaneSample(frame.samples[0].lane, frame.samples[0].position, END)
        head.take(head.scheduler.frame_received(SampledFrame(FENCE, frame.microbatch, (end,)), 0))
        assert head.tokens[name] == [END]
    assert head.ends == {"a": "stop"}


def test_ignore_eos_forbids_the_end_tokens_to_the_sampler() -> None:
    head = Head()
    head.submit("a", ignore_eos=True, logit_bias=((5, 1.0),))
    head.run()
    biases = dict(head.stages.opens[0].sampling.logit_bias)
    assert biases[5] == 1.0
    assert biases[END] < -1e6


def test_the_context_ends_a_generation_with_length() -> None:
    head = Head(context=16)
    head.submit("a", prompt=range(1, 11), max_tokens=500)
    head.run()
    # 16 cells hold 10 of the prompt and 6 fed tokens; the seventh needs no cell.
    assert len(head.tokens["a"]) == 7
    assert head.ends["a"] == "length"


def test_r17_lanes_that_run_together_say_what_each_says_alone() -> None:
    head = Head()
    prompts = {name: tuple(range(i + 1, i + 1 + 5 * i + 1)) for i, name in enumerate("abcd")}
    for name, prompt in prompts.items():
        head.submit(name, prompt, max_tokens=20)
    head.run()
    assert head.tokens == {name: answer(prompt, 20) for name, prompt in prompts.items()}


def test_busy_lanes_keep_as_many_microbatches_in_flight_as_there_are_stages() -> None:
    head = Head(stages=4)
    for name in "abcd":
        head.submit(name, max_tokens=50)
    for _ in range(100):
        head.send()
        assert len(head.stages.waiting) >= 4
        head.step()


def test_chunks_of_one_prompt_follow_each_other_up_to_the_window() -> None:
    head = Head(stages=2)
    head.submit("a", prompt=range(100), max_tokens=1)
    assert head.send() == 3, "one for each stage and one on the way back"
    head.step()
    assert head.send() == 1


def test_r15_a_long_prompt_delays_another_stream_by_at_most_one_chunk_a_stage() -> None:
    head = Head(stages=2)
    head.submit("short", max_tokens=100)
    head.steps(1)
    head.submit("long", prompt=range(300), max_tokens=1)
    while len(head.tokens["long"]) == 0:
        head.send()
        waiting = [len(frame.positions) for frame in head.stages.waiting]
        assert sum(rows > 1 for rows in waiting) <= 2
        assert any(rows == 1 for rows in waiting), "the short stream always has its row under way"
        head.step()


def test_chunks_of_two_prompts_take_turns() -> None:
    head = Head(stages=1)
    head.submit("a", prompt=range(80), max_tokens=1)
    head.submit("b", prompt=range(1, 9), max_tokens=1)
    head.steps(3)
    assert head.ends == {"b": "length"}


def test_only_the_last_row_of_a_prompt_is_sampled() -> None:
    head = Head()
    head.submit("a", prompt=range(20), max_tokens=1)
    head.send()
    flags = [bool(flag) for frame in head.stages.waiting for flag in frame.logits]
    assert flags == [False] * 19 + [True]


def test_rows_are_batched_where_that_pays_but_never_into_fewer_frames_than_stages() -> None:
    head = Head(stages=2, rows_per_microbatch=8)
    for name in "abcd":
        head.submit(name, max_tokens=60)
    for _ in range(40):
        head.send()
        head.step()
    head.send()
    assert sorted(len(frame.positions) for frame in head.stages.waiting) == [2, 2]
    head.run()
    assert head.tokens["d"] == answer((1, 2, 3), 60)


def test_r50_lanes_then_queue_then_refusal_at_once() -> None:
    head = Head(lanes=2, queue_per_lane=2)
    for number in range(6):
        head.submit(f"r{number}")
    with pytest.raises(Overloaded):
        head.submit("one too many")
    now = head.scheduler.statistics()
    assert (now.lanes_busy, now.queued) == (2, 4)
    assert now.rejected == {"queue_full": 1}
    head.run()
    assert len(head.ends) == 6


def test_r5_ten_thousand_refused_requests_leave_nothing_behind() -> None:
    head = Head(lanes=1, queue_per_lane=1)
    head.submit("runs")
    head.submit("waits")
    for number in range(10_000):
        with pytest.raises(Overloaded):
            head.scheduler.submit(Generation(f"r{number}", (1,), 1, Sampling()), 0)
    assert head.scheduler.statistics().rejected == {"queue_full": 10_000}
    head.run()
    assert head.all_free()
    head.submit("r1")
    head.run()
    assert set(head.ends) == {"runs", "waits", "r1"}


def test_r14_a_hundred_requests_one_after_the_other_on_one_lane() -> None:
    head = Head(lanes=1)
    for number in range(100):
        head.submit(f"r{number}", prompt=(number, 7), max_tokens=2)
        head.run()
        assert head.tokens[f"r{number}"] == answer((number, 7), 2)
    assert head.all_free()


def test_r50_a_queued_request_waits_no_longer_than_its_time() -> None:
    head = Head(lanes=1)
    head.submit("runs", max_tokens=10)
    head.now = 1.0
    head.submit("waits")
    assert head.scheduler.deadline() == pytest.approx(11.0)
    head.take(head.scheduler.expire(10.9))
    assert not head.ends
    head.take(head.scheduler.expire(11.0))
    assert isinstance(head.ends["waits"], Overloaded)
    assert head.scheduler.statistics().rejected == {"queue_timeout": 1}


def test_a_freed_lane_goes_to_the_first_in_the_queue() -> None:
    head = Head(lanes=1)
    for name in ("a", "b", "c"):
        head.submit(name, max_tokens=3)
    head.scheduler.cancel("b", 0)
    head.run()
    assert list(head.ends) == ["a", "c"]


def test_a_prompt_that_never_fits_is_refused_for_good() -> None:
    head = Head(context=16)
    with pytest.raises(PromptTooLong) as caught:
        head.submit("a", prompt=range(16))
    assert (caught.value.prompt_tokens, caught.value.context_tokens) == (16, 16)
    head.submit("b", prompt=range(15), max_tokens=9)
    head.run()
    assert len(head.tokens["b"]) == 2


def test_r25_a_second_request_of_an_id_is_refused_and_the_first_lives_on() -> None:
    head = Head()
    head.submit("a")
    with pytest.raises(InvalidRequest):
        head.scheduler.submit(Generation("a", (1,), 1, Sampling()), 0)
    head.run()
    assert head.ends == {"a": "length"}


def test_ids_outside_of_the_vocabulary_are_refused_before_they_reach_a_stage() -> None:
    for bad in (-1, VOCABULARY):
        with pytest.raises(InvalidRequest):
            Head().submit("a", prompt=(1, bad))


def test_a_draining_head_finishes_what_it_has() -> None:
    head = Head()
    head.submit("a")
    head.scheduler.drain("the node is leaving")
    with pytest.raises(Unavailable, match="leaving"):
        head.submit("b")
    head.run()
    assert head.ends == {"a": "length"}


def test_r10_a_cancelled_request_frees_its_lane_at_once_and_late_answers_are_ignored() -> None:
    head = Head(lanes=1)
    head.submit("a", max_tokens=50)
    head.steps(3)
    head.send()
    head.scheduler.cancel("a", 0)
    head.submit("b", prompt=(9, 9), max_tokens=5)
    head.run()
    assert head.tokens["b"] == answer((9, 9), 5)
    assert "a" not in head.ends
    assert head.all_free()


def test_a_cancel_of_the_only_request_clears_its_lane_on_the_stages() -> None:
    head = Head()
    head.submit("a", max_tokens=50)
    head.steps(3)
    head.scheduler.cancel("a", 0)
    head.scheduler.cancel("a", 0)
    head.run()
    assert head.stages.lanes == {}
    assert head.scheduler.statistics().cancelled == 1


def test_r92_a_fresh_request_opens_a_cleared_lane_with_its_sampler() -> None:
    head = Head(lanes=1)
    for name in ("a", "b"):
        head.submit(name, prompt=range(100), max_tokens=1, seed=7, penalty_window=4)
    head.run()
    assert [(o.lane, o.sampling.seed, o.window, o.generated) for o in head.stages.opens] == [
        (0, 7, (96, 97, 98, 99), 0)
    ] * 2


def test_a_request_waits_for_the_cells_that_an_older_one_reserved() -> None:
    head = Head(context=1000)
    head.submit("old", prompt=range(100), max_tokens=800)
    head.submit("young", prompt=range(5), max_tokens=300)
    now = head.scheduler.statistics()
    assert (now.lanes_busy, now.queued, now.cells_reserved) == (1, 1, 900)
    head.run()
    assert head.ends == {"old": "length", "young": "length"}


def test_an_answer_longer_than_its_reserve_grows_into_free_cells() -> None:
    head = Head(context=5000)
    head.submit("a", max_tokens=4000)
    assert head.scheduler.statistics().cells_reserved == 3 + head.options.answer_reserve
    head.run()
    assert len(head.tokens["a"]) == 4000


def test_r21_without_free_cells_the_youngest_is_paused_computed_again_and_draws_on_with_its_counter() -> None:
    head = Head(context=700)
    head.submit("old", prompt=range(10), max_tokens=380)
    head.submit("young", prompt=range(5), max_tokens=600)
    head.run()
    assert head.scheduler.statistics().pauses == 1
    assert head.tokens == {"old": answer(tuple(range(10)), 380), "young": answer(tuple(range(5)), 600)}
    resumed = head.stages.opens[-1]
    assert resumed.generated > head.options.growth
    assert list(resumed.window) == head.tokens["young"][resumed.generated - 64 : resumed.generated]


def test_a_lane_that_is_seated_again_gets_all_that_was_said_under_its_grammar() -> None:
    head = Head(context=700)
    head.submit("old", prompt=range(10), max_tokens=380)
    head.submit("young", prompt=range(5), max_tokens=600, grammar="start: x")
    head.run()
    plain, first, resumed = head.stages.opens
    assert (plain.sampling.grammar, plain.accepted, first.accepted) == ("", (), ())
    assert resumed.sampling.grammar == "start: x"
    assert len(resumed.accepted) == resumed.generated > head.options.growth
    assert list(resumed.accepted) == head.tokens["young"][: resumed.generated]


def test_a_grammar_that_a_stage_gives_up_is_the_clients_and_no_failure_of_the_stage() -> None:
    head = Head()
    head.submit("a", grammar="start: x")
    head.send()
    frame = head.stages.fail_oldest()
    refused = msgspec.structs.replace(frame.failure, reason=GRAMMAR_REFUSED, message="too complex")
    head.take(head.scheduler.frame_received(msgspec.structs.replace(frame, failure=refused), 0))
    assert isinstance(head.ends["a"], InvalidRequest)
    assert "too complex" in str(head.ends["a"])
    assert head.all_free()


def test_a_failed_microbatch_ends_its_lanes_and_no_others() -> None:
    head = Head()
    head.submit("a", max_tokens=9)
    head.submit("b", prompt=(5,), max_tokens=9)
    head.send()
    head.take(head.scheduler.frame_received(head.stages.fail_oldest(), 0))
    assert len(head.ends) == 1
    (failed,) = head.ends
    assert isinstance(head.ends[failed], StageError)
    assert head.ends[failed].reason == "fatal"
    head.run()
    assert head.ends[{"a": "b", "b": "a"}[failed]] == "length"
    assert head.all_free()


def test_r20_a_lane_that_was_not_at_fault_is_computed_again() -> None:
    head = Head(stages=1, rows_per_microbatch=8, lanes=2)
    for name in "ab":
        head.submit(name, max_tokens=30)
    head.steps(12)
    head.send()
    assert len(head.stages.waiting[0].positions) == 2
    head.take(head.scheduler.frame_received(head.stages.fail_oldest((0,)), 0))
    head.run()
    assert sorted(map(str, head.ends.values())) == ["length", "stage 1: a decode failed"]
    survivor = next(name for name, end in head.ends.items() if end == "length")
    assert head.tokens[survivor] == answer((1, 2, 3), 30)


def test_a_stage_that_always_blames_others_does_not_keep_a_request_for_ever() -> None:
    head = Head()
    head.submit("a")
    for _ in range(RETRIES + 1):
        assert not head.ends
        head.send()
        head.take(head.scheduler.frame_received(head.stages.fail_oldest((3,)), 0))
    assert isinstance(head.ends["a"], StageError)


def test_r57_no_token_for_too_long_ends_a_request_and_frees_its_lane() -> None:
    head = Head(token_timeout_s=30, row_patience_s=0.5)
    head.submit("a", prompt=range(16), max_tokens=9)
    head.send()
    assert head.scheduler.deadline() == pytest.approx(30 + 16 * 0.5), "rows under way take their time"
    head.now = 20.0
    head.step()
    assert head.scheduler.deadline() == pytest.approx(20 + 30 + 8 * 0.5), "a chunk that was answered is progress"
    head.take(head.scheduler.expire(53.9))
    assert not head.ends
    head.take(head.scheduler.expire(54.0))
    assert isinstance(head.ends["a"], TimedOut)
    assert head.scheduler.statistics().lanes_busy == 0


def test_a_consumer_that_does_not_read_rests_its_lane_and_no_other() -> None:
    head = Head(lanes=2)
    head.submit("slow", max_tokens=500)
    head.submit("fast", max_tokens=500)
    while "fast" not in head.ends:
        head.send()
        for event in head.scheduler.frame_received(head.stages.answer_oldest(), 0):
            head.take([event], read=event.id == "fast")
    head.run()
    assert len(head.tokens["slow"]) == UNREAD_TOKENS
    assert head.scheduler.expire(1e9) == [], "that is the client's delay, not ours"
    assert head.scheduler.taken("slow", 0)
    head.run()
    assert len(head.tokens["slow"]) > UNREAD_TOKENS


def test_a_lost_pipeline_ends_everyone_and_refuses_the_next() -> None:
    head = Head(lanes=1)
    head.submit("runs")
    head.submit("waits")
    head.take(head.scheduler.lose(StageLost("stage 1 ended")))
    assert all(isinstance(end, StageLost) for end in head.ends.values())
    assert len(head.ends) == 2
    with pytest.raises(Unavailable):
        head.submit("late")


def test_answers_that_were_not_asked_for_are_the_peers_fault() -> None:
    other = Fence(Term(2), RunId("11" * 8))
    rogue = [
        SampledFrame(other, 1, ()),
        SampledFrame(FENCE, 2, ()),
        SampledFrame(FENCE, 1, ()),
        SampledFrame(FENCE, 1, (LaneSample(0, 1, 5),)),
        SampledFrame(FENCE, 1, (LaneSample(1, 2, 5),)),
        SampledFrame(FENCE, 1, (LaneSample(0, 2, VOCABULARY),)),
    ]
    for frame in rogue:
        head = Head()
        head.submit("a")
        head.send()
        assert head.scheduler.frame_received(Heartbeat(FENCE, 1), 0) == []
        with pytest.raises(PeerError):
            head.scheduler.frame_received(frame, 0)


def test_looks_tell_how_many_stages_had_work_while_a_lane_was_busy() -> None:
    head = Head(stages=4)
    head.scheduler.look()
    head.submit("a", max_tokens=50)
    head.steps(1)
    head.send()
    head.scheduler.look()
    now = head.scheduler.statistics()
    assert (now.looks, now.looks_filled) == (1, 0.25)
    for name in "bcd":
        head.submit(name, max_tokens=50)
    head.send()
    head.scheduler.look()
    assert head.scheduler.statistics().looks_filled == 1.25


def test_grammars_of_others_that_fail_again_and_again_end_no_request_but_their_own() -> None:
    head = Head(stages=1, lanes=2, rows_per_microbatch=2)
    head.submit("good", (1, 2, 3), 40)
    for number in range(RETRIES + 1):
        bad = f"bad{number}"
        head.submit(bad, (7, number), 40, grammar="start: /a*/")
        while not (head.stages.waiting and len(set(head.stages.waiting[0].lanes)) == 2):
            head.steps(1)
            head.send()
        lane = next(each.lane for each in reversed(head.stages.opens) if each.sampling.grammar)
        failed = head.stages.fail_oldest((lane,))
        refused = msgspec.structs.replace(failed.failure, reason=GRAMMAR_REFUSED)
        head.take(head.scheduler.frame_received(msgspec.structs.replace(failed, failure=refused), head.now))
        assert isinstance(head.ends[bad], InvalidRequest)
    head.run()
    assert head.tokens["good"] == answer((1, 2, 3), 40)
    assert head.all_free()
