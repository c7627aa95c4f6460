"""One request on its way: its token ids, and where it sits.

A sequence is queued, then seated on a lane, perhaps paused (its cells went to an older one) and seated again, then
ended. Its ids survive a pause; everything a lane holds can be computed again from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from meshnode.core.serving.request import Generation, Sampled

UNSEATED: Final = -1


class Phase(Enum):
    """Where a sequence is. `ENDED` is final."""

    QUEUED = "queued"
    SEATED = "seated"
    PAUSED = "paused"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Sequence:
    """Counters are in tokens. Invariant while seated: sent <= reserved, and sent <= len(ids)."""

    request: Generation
    arrival: int
    """Submission order: the largest is the youngest."""
    since: float
    """Queued: when it came. Seated: the last progress. The clock of the head."""
    ids: list[int] = field(default_factory=list)
    """Prompt, then what was generated and can be fed again."""
    phase: Phase = Phase.QUEUED
    lane: int = UNSEATED
    seating: int = 0
    """Number of the seating; an answer to an earlier seating is not for us."""
    opened: bool = False
    """Whether a frame with this seating's Open was built."""
    reserved: int = 0
    sent: int = 0
    """Positions handed to frames: the next row has this position."""
    unread: int = 0
    """Tokens delivered and not yet taken by the consumer."""
    chunked: int = 0
    """Order number of the last prefill chunk: chunks of several prompts take turns."""
    cached: int = 0
    """Rows that its lane held when it was seated last."""
    begun: int = 0
    """Rows that its lane held when it was seated last; `cached` is 0 once that was told."""
    exact: int = 0
    """Of these: with the bits that computing them would give (`prefixes.Kept`)."""
    prefilled: int = 0
    """Length of `ids` when it was seated last: what is worked off in chunks."""
    fresh: bool = False
    """Whether it must compute every row: what it began with was not what a stage held."""
    scores: list[Sampled] = field(default_factory=list)
    """Of a scored prompt: its tokens from the second on, as far as their rows were answered. A pause keeps them."""
    retries: int = 0
    """How often a microbatch with it failed through no fault of its own."""

    def __post_init__(self) -> None:
        self.ids.extend(self.request.prompt)

    @property
    def generated(self) -> int:
        """Tokens accepted so far; the sampler's counter."""
        return len(self.ids) - len(self.request.prompt)

    @property
    def owner(self) -> str | None:
        """Whose rows it may begin with and leaves; scores want every row computed, and in chunks of their own."""
        return None if self.request.scored else self.request.owner

    def exact_rows(self, held: int, chunk: int) -> int:
        """Of the first `held` positions: those in whole chunks, as any prompt that begins with them has them."""
        if self.begun == self.exact and not self.begun % chunk:
            return min(held, self.prefilled) // chunk * chunk
        return min(held, self.exact) // chunk * chunk

    def unscored(self, position: int, rows: int) -> int:
        """How many of so many rows from `position` on are followed by a token of the prompt without a score."""
        first = max(position, len(self.scores))
        return max(0, min(position + rows, len(self.request.prompt) - 1) - first)

    @property
    def pending(self) -> int:
        """Ids without a row yet: 1 is a decode step, more is a prompt to work off, 0 waits for an answer."""
        return len(self.ids) - self.sent
