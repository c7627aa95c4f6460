"""What this node's answers took, counted while they are given.

Invariant: what is kept does not grow with requests or clients: models and status codes are the only names, and both
are bounded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

MODELS: Final = 32
"""Named apart; further ones, over the life of a node, share a name."""
OTHERS: Final = "(others)"

FIRST_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
"""To the first token: vLLM's range; a long prompt on slow machines takes minutes."""
TOKEN_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
WHOLE_S: Final = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0)


class Histogram:
    """Prometheus' form: how many values lie at or below each bound, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        """In each interval; the last one has no upper bound."""
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """One more value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass
class ModelMeter:
    """One model's generations on this node."""

    first: Histogram = field(default_factory=lambda: Histogram(FIRST_S))
    """Seconds from the request to its first token, waiting for a lane included."""
    token: Histogram = field(default_factory=lambda: Histogram(TOKEN_S))
    """Seconds between two tokens of one generation."""
    whole: Histogram = field(default_factory=lambda: Histogram(WHOLE_S))
    """Seconds from the request to the last token of one generation."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompts: not computed, because a lane held them."""
    generated_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    """Generations by how they ended: stop, length, error, left (the client, or this node, went away)."""


class Timing:
    """Follows one generation. `now` is the monotonic time in seconds."""

    def __init__(self, meter: ModelMeter, now: float) -> None:
        self._meter = meter
        self._began = self._last = now
        self._ended = ""
        self._tokens = 0

    def token(self, now: float) -> None:
        """One more token came."""
        (self._meter.token if self._tokens else self._meter.first).observe(now - self._last)
        self._tokens += 1
        self._last = now

    def ended(self, how: str) -> None:
        """`finish` of the last token, or `error`."""
        self._ended = how

    def close(self) -> None:
        """Nothing comes any more."""
        meter = self._meter
        meter.generated_tokens += self._tokens
        meter.finished[self._ended or "left"] += 1
        if self._ended in ("stop", "length"):
            meter.whole.observe(self._last - self._began)


@dataclass
class Meter:
    """All of a node."""

    refused: Counter[str] = field(default_factory=Counter)
    """Requests that were not let in, by reason: host, origin, key, key_limit."""
    statuses: Counter[int] = field(default_factory=Counter)
    """Answers to clients, by HTTP status."""
    models: dict[str, ModelMeter] = field(default_factory=dict)

    def of(self, model: str) -> ModelMeter:
        """The part of one model."""
        name = model if model in self.models or len(self.models) < MODELS else OTHERS
        return self.models.setdefault(name, ModelMeter())
