"""From token ids to text, one token at a time: what may be shown already, and what must be held back.

A token is bytes, not characters: a character may spread over tokens, and so may a stop string. Both are held back
until they are decided. Invariant: the text that comes out does not depend on how the tokens were grouped.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

import msgspec

STOP_STRINGS = 16
"""OpenAI allows 4, lm-eval sends 4; more cost a scan per token each."""
STOP_CHARACTERS = 1024
"""Of one stop string: so much text at most is held back."""


class Vocabulary(msgspec.Struct, frozen=True):
    """What the head knows of a model's tokens, as its tokenizer describes them."""

    pieces: tuple[bytes, ...]
    """Text of every token id as it shows in an answer; control tokens show nothing."""
    markers: dict[int, bytes]
    """The written form of control tokens, such as `<|end|>`."""
    end: frozenset[int]
    """Tokens that end a generation."""
    bos: int = -1
    eos: int = -1
    """-1: the model has none."""
    add_bos: bool = False
    chat_template: str = ""
    """Jinja text from the model file: untrusted."""
    fingerprint: str = ""
    """Hex digest of everything above; two nodes with equal fingerprints tokenize alike."""
    fim: tuple[int, int, int] = (-1, -1, -1)
    """Tokens before a prefix, before a suffix, and before what is to be filled in between; -1: the model has none."""

    @property
    def fills(self) -> bool:
        """Whether the model was trained to fill in."""
        return min(self.fim) >= 0

    def shown(self, token: int) -> bytes:
        """The text of one token in an answer; nothing for an id outside the vocabulary."""
        return self.pieces[token] if 0 <= token < len(self.pieces) else b""

    def written(self, token: int) -> bytes:
        """The text of one token with control tokens spelled out."""
        return self.markers.get(token) or self.shown(token)


class Conversation(msgspec.Struct, frozen=True):
    """What a chat template turns into a prompt."""

    messages: tuple[dict[str, Any], ...]
    """Each with `role` and `content` (text), and what else the client gave."""
    variables: dict[str, Any] = {}
    """Further names the template may read (`chat_template_kwargs`)."""


class Detokenizer:
    """Bytes of tokens to text; an incomplete character waits, an impossible one becomes U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, piece: bytes) -> str:
        """The text that is certain after one more token."""
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What was held back, with U+FFFD for a character that never became whole."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Ends the text at the first stop string and holds back whatever may still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = ""
        """The stop string that ended the text; nothing comes out any more."""

    @property
    def stopped(self) -> bool:
        """Whether one was found."""
        return bool(self.found)

    def feed(self, text: str) -> str:
        """The text that is certainly not part of a stop string."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            # The one that is whole first, as if the text had come letter by letter.
            _, start, self.found = min(found)
            shown, self._held = self._held[:start], ""
            return shown
        keep = max(overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back and never became a stop string."""
        shown, self._held = self._held, ""
        return shown


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
