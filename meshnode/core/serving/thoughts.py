"""Tells what a model thinks from what it says: `<think>...</think>` at the beginning of an answer.

Invariant: what comes out, joined, does not depend on how the text was cut; nothing of a tag is ever shown.
"""

from __future__ import annotations

from typing import Final

import msgspec

from meshnode.core.serving.text import overlap

TAGS: Final = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""What the families write: DeepSeek, Qwen and those after them; Magistral."""


class Thinking(msgspec.Struct, frozen=True):
    """How the answers to one prompt mark their thoughts."""

    begin: str
    end: str
    begun: bool
    """The prompt itself ends with `begin`, so the answer starts with a thought."""

    @property
    def tags(self) -> frozenset[bytes]:
        """Both, as tokens spell them."""
        return frozenset({self.begin.encode(), self.end.encode()})


def thinking_of(template: str, prompt: str) -> Thinking | None:
    """None for a model whose template knows no thoughts: such tags in its answers are text."""
    for begin, end in TAGS:
        if end in template:
            return Thinking(begin, end, prompt.rstrip().endswith(begin))
    return None


class ThoughtSplitter:
    """Text in, (thought, speech) out. White space around both is dropped where there was a thought at all."""

    def __init__(self, thinking: Thinking) -> None:
        self._tags = thinking
        self._held = ""
        self._state = "thought" if thinking.begun else "unknown"
        self._trim = thinking.begun
        """Whether white space that comes next is dropped."""

    @property
    def in_thought(self) -> bool:
        """Whether the next text is likely a thought."""
        return self._state == "thought"

    def feed(self, text: str) -> tuple[str, str]:
        """What is certain after `text`."""
        self._held += text
        if self._state == "unknown":
            start = self._held.lstrip()
            if start.startswith(self._tags.begin):
                self._held, self._state, self._trim = start[len(self._tags.begin) :], "thought", True
            elif self._tags.begin.startswith(start):
                return "", ""
            else:
                self._state = "speech"
        if self._state == "thought":
            return self._think()
        return "", self._take(len(self._held))

    def finish(self) -> tuple[str, str]:
        """What was held back: an answer that ends within a thought, or within something like a tag."""
        rest, self._held = self._held, ""
        if self._state == "thought":
            return rest.rstrip(), ""
        return "", rest

    def _think(self) -> tuple[str, str]:
        before, found, after = self._held.partition(self._tags.end)
        if found:
            self._held = before.rstrip()
            thought = self._take(len(self._held))
            self._held, self._state, self._trim = after, "speech", True
            return thought, self._take(len(after))
        sure = len(self._held) - overlap(self._held, self._tags.end)
        return self._take(len(self._held[:sure].rstrip())), ""

    def _take(self, count: int) -> str:
        """The first `count` characters of what is held, without white space at a beginning."""
        taken, self._held = self._held[:count], self._held[count:]
        if self._trim:
            taken = taken.lstrip()
            self._trim = not taken
        return taken
