"""One choice of an answer: sampled tokens in, pieces of text with their tokens out.

A token's log-probabilities leave together with its text: both wait while a character or a stop string is undecided,
and tokens that a stop string cut off never leave.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from meshnode.core.serving.request import Sampled
from meshnode.core.serving.text import Detokenizer, StopStrings, Vocabulary


class Spoken(msgspec.Struct, frozen=True):
    """One token of the answer and where its text begins, in characters of the answer."""

    sampled: Sampled
    offset: int


class Delta(msgspec.Struct, frozen=True):
    """What one more token added to choice `index`. `finish` is set on the last one: "stop" or "length"."""

    index: int
    text: str
    tokens: tuple[Spoken, ...] = ()
    finish: str = ""


class Choice:
    """Follows one generation; `generated` counts its tokens, the ending one included."""

    def __init__(self, index: int, vocabulary: Vocabulary, stops: Sequence[str]) -> None:
        self.index = index
        self.generated = 0
        self._vocabulary = vocabulary
        self._detokenizer = Detokenizer()
        self._stops = StopStrings(stops)
        self._waiting: deque[Spoken] = deque()
        self._decoded = 0
        self._shown = 0

    def feed(self, sampled: Sampled) -> Delta:
        """The visible effect of one more token; after a `finish` nothing may follow."""
        self.generated += 1
        if sampled.finish == "stop":
            return self._last("", "stop")
        self._waiting.append(Spoken(sampled, self._decoded))
        text = self._detokenizer.feed(self._vocabulary.shown(sampled.token))
        self._decoded += len(text)
        shown = self._stops.feed(text)
        if self._stops.stopped or sampled.finish:
            return self._last(shown, "stop" if self._stops.stopped else sampled.finish)
        return Delta(self.index, shown, self._release(shown))

    def _last(self, shown: str, finish: str) -> Delta:
        shown += "" if self._stops.stopped else self._stops.feed(self._detokenizer.finish())
        if self._stops.stopped:
            return Delta(self.index, shown, self._release(shown), "stop")
        shown += self._stops.finish()
        return Delta(self.index, shown, self._release(shown) + tuple(self._waiting), finish)

    def _release(self, shown: str) -> tuple[Spoken, ...]:
        """Tokens whose text has begun to show."""
        self._shown += len(shown)
        released = []
        while self._waiting and self._waiting[0].offset < self._shown:
            released.append(self._waiting.popleft())
        return tuple(released)
