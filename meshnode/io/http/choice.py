"""One choice of an answer: sampled tokens in, pieces of text with their tokens out.

A token's log-probabilities leave together with its text: both wait while a character or a stop string is undecided,
and tokens that a stop string cut off never leave.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from meshnode.core.serving.calls import TAGS, Call, CallSplitter, Format
from meshnode.core.serving.forced import ForcedSplitter
from meshnode.core.serving.grammar import Frame
from meshnode.core.serving.request import Sampled
from meshnode.core.serving.text import Detokenizer, StopStrings, Vocabulary
from meshnode.core.serving.thoughts import Thinking, ThoughtSplitter


class Spoken(msgspec.Struct, frozen=True):
    """One token of the answer and where its text begins, in characters of the answer."""

    sampled: Sampled
    offset: int


class Delta(msgspec.Struct, frozen=True):
    """What one more token added to choice `index`. `finish` is set on the last one: stop, length or tool_calls."""

    index: int
    text: str
    tokens: tuple[Spoken, ...] = ()
    finish: str = ""
    thought: str = ""
    """What the model thought before it spoke; it comes before `text`."""
    stop: str = ""
    """The stop string that ended it, with `finish`."""
    calls: tuple[Call, ...] = ()
    """Tool calls that are whole now; they come after `text`."""
    prompt: tuple[Sampled, ...] = ()
    """With the first delta of a scored prompt: its tokens from the second on."""


class Reading(msgspec.Struct, frozen=True):
    """What besides text is looked for in an answer, and what of it is told; None: it is text, and all of that."""

    thinking: Thinking | None = None
    calling: Format | None = None
    tools: dict[str, frozenset[str]] = {}
    """Names that may be called, each with those of its parameters that are text."""
    one_call: bool = False
    """The answer ends with its first call."""
    forced: Frame | None = None
    """The grammar makes the answer nothing but calls in this frame."""
    pieces: bool = False
    """Arguments of forced calls are wanted while they are written."""
    ending: bool = False
    """The token that ends the answer is told of as well, though it is no text: who scores a prompt and asks for one
    token behind it counts on one."""
    silent: bool = False
    """Nothing is told: max_tokens was 0, and what had to be drawn behind the prompt is nobody's."""


PLAIN = Reading()


def _splitter(reading: Reading) -> CallSplitter | ForcedSplitter | None:
    if reading.forced is not None:
        return ForcedSplitter(reading.forced, pieces=reading.pieces)
    return None if reading.calling is None else CallSplitter(reading.calling, reading.tools)


class Choice:
    """Follows one generation; `generated` counts its tokens, the ending one included, `thought` those of a thought."""

    def __init__(self, index: int, vocabulary: Vocabulary, stops: Sequence[str], reading: Reading = PLAIN) -> None:
        self.index = index
        self.generated = 0
        self.thought = 0
        self._thoughts = None if reading.thinking is None else ThoughtSplitter(reading.thinking)
        self._calls = _splitter(reading)
        self._one_call, self._ending, self._silent = reading.one_call, reading.ending, reading.silent
        self._tags = frozenset() if reading.thinking is None else reading.thinking.tags
        self._tags |= frozenset() if reading.calling is None else TAGS
        self._vocabulary = vocabulary
        self._detokenizer = Detokenizer()
        self._stops = StopStrings(stops)
        self._waiting: deque[Spoken] = deque()
        self._decoded = 0
        self._shown = 0

    def feed(self, sampled: Sampled) -> Delta:
        """The visible effect of one more token; after a `finish` nothing may follow."""
        if self._silent:
            return Delta(self.index, "", (), "length")
        self.generated += 1
        self.thought += self._thoughts is not None and self._thoughts.in_thought
        if sampled.finish == "stop":
            if self._ending:
                self._waiting.append(Spoken(sampled, self._decoded))
            return self._last("", "stop")
        self._waiting.append(Spoken(sampled, self._decoded))
        text = self._detokenizer.feed(self._piece(sampled.token))
        self._decoded += len(text)
        shown = self._stops.feed(text)
        if self._stops.stopped or sampled.finish:
            return self._last(shown, "stop" if self._stops.stopped else sampled.finish)
        return self._delta(shown, self._release(shown))

    def _piece(self, token: int) -> bytes:
        """Some vocabularies hide the tags of a thought from answers, as they do with control tokens."""
        written = self._vocabulary.written(token)
        return written if written in self._tags else self._vocabulary.shown(token)

    def _delta(self, shown: str, tokens: tuple[Spoken, ...], finish: str = "") -> Delta:
        thought, text = self._split(shown, bool(finish))
        calls: list[Call] = []
        if self._calls is not None:
            text, calls = self._calls.feed(text)
            if self._one_call and calls:
                calls, finish = calls[:1], "stop"
            elif finish:
                rest, last = self._calls.finish()
                text, calls = text + rest, calls + last
                calls = calls[:1] if self._one_call else calls
            if finish == "stop" and self._calls.calls:
                finish = "tool_calls"
        return Delta(self.index, text, tokens, finish, thought, self._stops.found, tuple(calls))

    def _split(self, shown: str, last: bool) -> tuple[str, str]:
        """Thought and text."""
        if self._thoughts is None:
            return "", shown
        thought, text = self._thoughts.feed(shown)
        if last:
            last_thought, last_text = self._thoughts.finish()
            thought, text = thought + last_thought, text + last_text
        return thought, text

    def _last(self, shown: str, finish: str) -> Delta:
        shown += "" if self._stops.stopped else self._stops.feed(self._detokenizer.finish())
        if self._stops.stopped:
            return self._delta(shown, self._release(shown), "stop")
        shown += self._stops.finish()
        return self._delta(shown, self._release(shown) + tuple(self._waiting), finish)

    def _release(self, shown: str) -> tuple[Spoken, ...]:
        """Tokens whose text has begun to show."""
        self._shown += len(shown)
        released = []
        while self._waiting and self._waiting[0].offset < self._shown:
            released.append(self._waiting.popleft())
        return tuple(released)
