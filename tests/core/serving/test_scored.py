"""Scored prompts through the scheduler: every token of them is told once, with what came before it."""

from __future__ import annotations

import msgspec
import pytest

from meshnode.core.serving.request import Sampled
from meshnode.errors import PeerError
from meshnode.wire.activation import SampledFrame
from meshnode.wire.limits import SCORED_ROWS
from tests.core.serving.head import Head
from tests.core.serving.stages import FENCE, answer, scores

PROMPT = tuple(range(1, 101))


def told(scored: list[Sampled]) -> list[tuple[int, float | None]]:
    return [(each.token, each.logprob) for each in scored]


@pytest.mark.parametrize("size", [1, 2, 32, 33, 34, 64, 65, 100])
@pytest.mark.parametrize("chunk", [1, 8, 128])
def test_a_scored_prompt_comes_with_the_first_token_each_of_its_own_behind_those_before_it(size, chunk) -> None:
    head = Head(chunk=chunk)
    head.submit("a", PROMPT[:size], max_tokens=3, scored=True)
    head.run()
    assert told(head.scores["a"]) == scores(PROMPT[:size])
    assert head.tokens["a"] == answer(PROMPT[:size], 3)
    assert head.all_free()


def test_the_logits_of_a_scored_prompt_fit_the_room_for_them_whatever_the_chunk() -> None:
    head = Head(chunk=512)
    head.submit("a", range(1, 301), scored=True)
    head.submit("b", range(1, 301))
    head.send()
    assert {sum(frame.logits) for frame in head.stages.waiting} <= {SCORED_ROWS, 0, 1}
    head.run()
    assert told(head.scores["a"]) == scores(tuple(range(1, 301)))
    assert head.scores["b"] == []


def test_a_prompt_that_has_to_start_again_is_told_every_score_once() -> None:
    head = Head(stages=1)
    head.submit("a", PROMPT, max_tokens=2, scored=True)
    for _ in range(3):
        head.steps(1)
    head.take(head.scheduler.frame_received(head.stages.fail_oldest(lanes=(3,)), 0))
    sent = head.stages.number
    head.run()
    assert told(head.scores["a"]) == scores(PROMPT)
    assert head.tokens["a"] == answer(PROMPT, 2)
    assert head.stages.number - sent > len(PROMPT) // 8, "all its rows were computed again"


@pytest.mark.parametrize("change", [{"token": 7}, {"position": 5}, {"lane": 2}, {"logprob": None}])
def test_a_score_of_another_row_or_token_ends_the_run(change) -> None:
    head = Head()
    head.submit("a", scored=True)
    head.send()
    frame = head.stages.answer_oldest()
    wrong = msgspec.structs.replace(frame.samples[0], **change)
    with pytest.raises(PeerError):
        head.scheduler.frame_received(SampledFrame(FENCE, frame.microbatch, (wrong, *frame.samples[1:])), 0)
