from __future__ import annotations

import random

import pytest

from meshnode.core.serving.prefixes import Reuse
from meshnode.core.serving.request import Generation
from meshnode.errors import Overloaded, PromptTooLong
from meshnode.wire.sampling import Sampling
from tests.core.serving.head import Head
from tests.core.serving.stages import VOCABULARY, answer, scores


class Chaos(Head):
    """One random history of everything that can happen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        super().__init__(
            stages=self.random.choice((1, 2, 3)),
            lanes=self.random.choice((1, 2, 4)),
            context=self.random.choice((300, 700, 1500)),
            rows_per_microbatch=self.random.choice((1, 1, 4)),
            queue_per_lane=1,
            answer_reserve=16,
            growth=4,
            reuse=self.random.choice(tuple(Reuse)),
        )
        # A model whose lanes cannot be cut is mostly known for one, and sometimes found out.
        self.stages.cuts = self.options.reuse is Reuse.ANY and self.random.random() < 0.8
        self.wanted: dict[str, Generation] = {}
        self.cancelled: set[str] = set()
        self.refused = 0

    def arrive(self, number: int) -> None:
        draw = self.random
        size, most = draw.choice((1, 2, 30, 200)), draw.choice((1, 3, 40, 400))
        prompt = tuple(draw.randrange(VOCABULARY) for _ in range(size))
        owner = draw.choice((None, "one", "one", "one", "one", "two"))
        same = [each for each in self.wanted.values() if each.owner == owner]
        if same and draw.random() < 0.8:
            # The next turn of a chat, or another one that begins alike.
            former = draw.choice(same[-3:])
            said = (*former.prompt, *self.tokens[former.id])
            prompt = (*said[: draw.choice((len(said), len(said) // 2))], *prompt)
        name = f"r{number}"
        try:
            scored = number % 5 == 0
            self.submit(name, prompt, most, owner=owner, scored=scored)
            self.wanted[name] = Generation(name, prompt, most, Sampling(), owner=owner, scored=scored)
        except (Overloaded, PromptTooLong):
            self.refused += 1

    def leave(self) -> None:
        living = [name for name in self.wanted if name not in self.ends and name not in self.cancelled]
        if living:
            name = self.random.choice(living)
            self.scheduler.cancel(name, self.now)
            self.cancelled.add(name)

    def act(self, number: int) -> None:
        self.now += self.random.choice((0.0, 0.01, 0.3))
        match self.random.choices(("arrive", "leave", "answer", "fail", "expire"), (3, 1, 40, 0.3, 1))[0]:
            case "arrive":
                self.arrive(number)
            case "leave":
                self.leave()
            case "answer" if self.stages.waiting:
                self.step()
            case "fail" if self.stages.waiting and self.stages.waiting[0].positions:
                self.take(self.scheduler.frame_received(self.stages.fail_oldest(), self.now))
            case "expire":
                self.take(self.scheduler.expire(self.now))
        self.send()


@pytest.mark.parametrize("seed", range(12))
def test_r52_r53_random_histories_lose_no_lane_no_cell_and_no_request(seed) -> None:
    chaos = Chaos(seed)
    for number in range(900):
        chaos.act(number)
        now = chaos.scheduler.statistics()
        assert now.cells_live <= now.cells_reserved <= now.context - now.cells_kept
        assert now.lanes_busy + now.lanes_kept <= now.lanes
    chaos.run()
    assert chaos.all_free()
    kept = chaos.scheduler.statistics()
    held = chaos.stages.lanes.values()
    assert (sum(map(bool, held)), sum(map(len, held))) == (kept.lanes_kept, kept.cells_kept)
    assert set(chaos.ends) | chaos.cancelled == set(chaos.wanted), "every request ended"
    for name, request in chaos.wanted.items():
        got = chaos.tokens[name]
        assert got == answer(request.prompt, len(got)), "pauses and failures change no token"
        told = [(each.token, each.logprob) for each in chaos.scores[name]]
        assert told == (scores(request.prompt) if request.scored and got else []), "nor a score"


@pytest.mark.parametrize("seed", [0, 10])
def test_the_histories_use_what_ended_requests_left(seed) -> None:
    chaos = Chaos(seed)
    for number in range(900):
        chaos.act(number)
    assert chaos.scheduler.statistics().cached_tokens > 200
