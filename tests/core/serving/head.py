"""A scheduler on perfect stages, for tests."""

from __future__ import annotations

from meshnode.core.serving.events import Event, Failed, TokenReady
from meshnode.core.serving.options import ServingOptions
from meshnode.core.serving.request import Generation, Sampled
from meshnode.core.serving.scheduler import Scheduler
from meshnode.wire.sampling import Sampling
from tests.core.serving.stages import END, FENCE, VOCABULARY, Stages


class Head:
    """A scheduler on perfect stages, with what every consumer got."""

    def __init__(self, **changes) -> None:
        values = {"stages": 2, "context": 4096, "vocabulary": VOCABULARY, "end_tokens": frozenset({END}), "chunk": 8}
        self.options = ServingOptions(**(values | changes))
        self.scheduler = Scheduler(self.options, FENCE)
        self.stages = Stages(self.options.context, self.options.chunk)
        self.tokens: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}
        self.scores: dict[str, list[Sampled]] = {}
        self.ends: dict[str, str | Exception] = {}
        self.now = 0.0

    def submit(
        self, name: str, prompt=(1, 2, 3), max_tokens=4, *, owner=None, repeatable=False, scored=False, **sampling
    ) -> None:
        chosen = {"owner": owner, "repeatable": repeatable, "scored": scored}
        request = Generation(name, tuple(prompt), max_tokens, Sampling(**sampling), **chosen)
        self.scheduler.submit(request, self.now)
        self.tokens[name] = []
        self.scores[name] = []

    def send(self) -> int:
        frames = self.scheduler.next_frames(self.now)
        self.stages.take(frames)
        return len(frames)

    def step(self) -> None:
        self.take(self.scheduler.frame_received(self.stages.answer_oldest(), self.now))

    def take(self, events: list[Event], *, read: bool = True) -> None:
        for event in events:
            assert event.id not in self.ends, "nothing follows the end of a request"
            match event:
                case TokenReady(name, sampled):
                    assert not (sampled.cached and self.tokens[name]), "it comes with the first token"
                    self.cached[name] = self.cached.get(name, 0) + sampled.cached
                    assert not (sampled.prompt and self.tokens[name]), "scores come with the first token"
                    self.scores.setdefault(name, []).extend(sampled.prompt)
                    self.tokens[name].append(sampled.token)
                    if sampled.finish:
                        self.ends[name] = sampled.finish
                    elif read:
                        self.scheduler.taken(name, self.now)
                case Failed(name, error):
                    self.ends[name] = error

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.send()
            self.step()

    def run(self) -> None:
        self.send()
        while self.stages.waiting:
            self.step()
            self.send()

    def all_free(self) -> bool:
        now = self.scheduler.statistics()
        return (now.lanes_busy, now.queued, now.paused, now.cells_reserved, now.in_flight) == (0, 0, 0, 0, 0)
