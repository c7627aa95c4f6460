"""What counts as a good answer to the probe, and what does not."""

from __future__ import annotations

import msgspec
import pytest

from meshnode.core.serving.prefixes import Reuse
from meshnode.core.serving.probe import TIE, TOKENS, compare, judge, probe_requests, probe_tokens, reuse_of
from meshnode.core.serving.request import Alternative, Sampled
from meshnode.core.serving.text import Vocabulary
from meshnode.errors import StageError
from tests.core.serving.head import Head


def vocabulary(size: int, silent: tuple[int, ...] = (), end: tuple[int, ...] = ()) -> Vocabulary:
    pieces = tuple(b"" if token in silent else b"x" for token in range(size))
    return Vocabulary(pieces, dict.fromkeys(silent, b"<s>"), frozenset(end))


def answer(*likely: tuple[int, float]) -> Sampled:
    return Sampled(likely[0][0], likely[0][1], tuple(Alternative(*each) for each in likely), "length")


def clear(*tokens: int) -> Sampled:
    """An answer in which no two tokens are near each other."""
    return answer(*((token, -1.0 - place) for place, token in enumerate(tokens)))


@pytest.mark.parametrize("size", [16, 17, 100, 32_000])
def test_the_tokens_are_sixteen_different_ones_of_the_vocabulary(size: int) -> None:
    tokens = probe_tokens(vocabulary(size))
    assert len(set(tokens)) == TOKENS
    assert all(0 <= token < size for token in tokens)
    assert tokens == probe_tokens(vocabulary(size))


def test_control_tokens_and_ends_are_left_out_where_there_are_others() -> None:
    tokens = probe_tokens(vocabulary(64, silent=(0, 1, 2, 3, 4, 63), end=(16, 17, 18)))
    assert not {0, 1, 2, 3, 4, 63, 16, 17, 18} & set(tokens)
    assert len(set(tokens)) == TOKENS


@pytest.mark.parametrize("size", [1, 2, 15])
def test_a_vocabulary_that_is_too_small_gives_tokens_of_its_own_all_the_same(size: int) -> None:
    tokens = probe_tokens(vocabulary(size))
    assert len(tokens) == TOKENS
    assert set(tokens) == set(range(size))


def test_the_second_question_goes_through_the_stages_in_two_chunks() -> None:
    whole, _, halves = probe_requests("p", tuple(range(TOKENS)))
    head = Head(chunk=128)
    head.scheduler.submit(whole, 0.0)
    assert [len(frame.positions) for frame in head.scheduler.next_frames(0.0)] == [16]
    head = Head(chunk=128)
    head.scheduler.submit(halves, 0.0)
    assert [list(frame.positions) for frame in head.scheduler.next_frames(0.0)] == [[*range(8)], [*range(8, 16)]]


def test_a_run_with_smaller_chunks_keeps_its_own() -> None:
    _, _, halves = probe_requests("p", tuple(range(TOKENS)))
    head = Head(chunk=4)
    head.scheduler.submit(halves, 0.0)
    assert {len(frame.positions) for frame in head.scheduler.next_frames(0.0)} == {4}


def test_the_five_most_likely_tokens_of_a_good_answer_are_what_is_remembered() -> None:
    assert judge(clear(5, 4, 3, 2, 1, 0), clear(5, 4, 3, 2, 1, 0)) == (5, 4, 3, 2, 1)


@pytest.mark.parametrize(
    ("whole", "halves", "why"),
    [
        (clear(1, 2), clear(2, 1), "token 1 comes of one chunk, token 2 of two"),
        (clear(1, 2, 3), clear(4, 5, 6), "token 1 comes"),
        (answer((1, float("nan")), (2, -1.0)), clear(1, 2), "no finite numbers"),
        (clear(1, 2), answer((1, -1.0), (2, float("-inf"))), "no finite numbers"),
        (answer((1, -3.0), (2, -3.0), (3, -3.0)), clear(1, 2), "as likely as any other"),
        (Sampled(1, -1.0, (), "length"), clear(1, 2), "no finite numbers"),
    ],
)
def test_what_comes_of_broken_wiring_is_refused_with_its_reason(whole: Sampled, halves: Sampled, why: str) -> None:
    with pytest.raises(StageError, match=why) as refused:
        judge(whole, halves)
    assert refused.value.reason == "probe_failed"


def test_two_tokens_that_are_as_good_as_each_other_may_change_places_between_chunks() -> None:
    one = answer((1, -1.0), (2, -1.0 - TIE / 2), (3, -4.0))
    other = answer((2, -1.0), (1, -1.0 - TIE / 2), (3, -4.0))
    assert judge(one, other) == (1, 2, 3)


def test_four_of_the_five_that_were_recorded_are_enough() -> None:
    compare(clear(1, 2, 3, 4, 9, 5), (1, 2, 3, 4, 5), "f")


def test_three_of_five_are_not_and_both_sides_are_named() -> None:
    with pytest.raises(StageError, match=r"are 1, 2, 3, 8, 9, .* were 1, 2, 3, 4, 5 \(f; delete") as refused:
        compare(clear(1, 2, 3, 8, 9, 4, 5), (1, 2, 3, 4, 5), "f")
    assert refused.value.reason == "probe_failed"


def test_what_is_as_good_as_the_fifth_counts_as_one_of_the_five() -> None:
    crowd = answer((1, -1.0), (2, -2.0), (3, -3.0), (8, -3.5), (9, -3.5), (4, -3.5 - TIE / 2), (5, -3.5 - TIE / 2))
    compare(crowd, (1, 2, 3, 4, 5), "f")


def test_a_model_with_fewer_tokens_is_asked_for_all_it_has() -> None:
    compare(clear(1, 2, 3), (1, 2, 3), "f")
    with pytest.raises(StageError):
        compare(clear(1, 2, 4), (1, 2, 3), "f")


@pytest.mark.parametrize(("lanes", "cuts", "reuse"), [(1, True, 15), (4, True, 15), (1, False, 0), (4, False, 0)])
def test_the_third_question_finds_its_beginning_on_a_lane_unless_the_stages_cannot_cut_one(lanes, cuts, reuse) -> None:
    head = Head(lanes=lanes, chunk=128)
    head.stages.cuts = cuts
    for request in probe_requests("p", tuple(range(TOKENS))):
        head.scheduler.submit(request, 0.0)
        head.tokens[request.id] = []
        head.run()
    assert head.cached == {"p-whole": 0, "p-again": reuse, "p-halves": 0}
    assert head.tokens["p-again"] == head.tokens["p-whole"]


def test_what_can_be_used_again_is_what_was_and_gave_the_same() -> None:
    whole = clear(1, 2, 3)
    assert reuse_of(whole, msgspec.structs.replace(whole, cached=15)) is Reuse.ANY
    assert reuse_of(whole, whole) is Reuse.WHOLE
    assert reuse_of(whole, msgspec.structs.replace(clear(2, 1, 3), cached=15)) is Reuse.NONE
    assert reuse_of(whole, Sampled(1, cached=15)) is Reuse.NONE
