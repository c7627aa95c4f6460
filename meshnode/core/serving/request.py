"""What a head is asked for and what it gives back: the contract between the API and the scheduler."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from meshnode.wire.sampling import Sampling


class Generation(msgspec.Struct, frozen=True):
    """One sequence to generate. `prompt` is never empty; `max_tokens` >= 1, already capped by the context."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    chunk: int = 0
    """Most rows of the prompt in one frame, where that is less than the run's own; 0: the run's. For the probe."""
    owner: str | None = None
    """Whose rows it may begin with, where a lane still holds them, and whose those are that it leaves. None: every row
    is computed, and none is left."""
    repeatable: bool = False
    """It begins only with rows of which a run without any would have the same bits: whole chunks of prompts."""
    scored: bool = False
    """The prompt's own tokens are wanted with their log-probabilities (`Sampled.prompt`): every row of it is computed,
    in chunks of `limits.SCORED_ROWS` at most, and none may come of what another request left in a cache."""


class Alternative(msgspec.Struct, frozen=True):
    """One of the most likely tokens at a position, with its natural log-probability."""

    token: int
    logprob: float


class Sampled(msgspec.Struct, frozen=True):
    """One generated token. `finish` is set on the last one of a generation.

    finish "stop": `token` is an end-of-generation token and not part of the text.
    finish "length": `token` is part of the text and max_tokens or the context ended the generation.
    """

    token: int
    logprob: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    finish: str = ""
    prompt: tuple[Sampled, ...] = ()
    """With the first token of a scored generation: every token of the prompt behind the first, as if it had been
    generated after those before it."""
    cached: int = 0
    """With the first token: rows of the prompt that were not computed, because a lane held them."""


class Generator(Protocol):
    """A served run, seen from the API. Leaving the context frees the lane, at any moment, exactly once."""

    def generate(self, request: Generation) -> AbstractAsyncContextManager[AsyncIterator[Sampled]]:
        """Stream one generation.

        Raises on entry or while iterating: PromptTooLong, Overloaded, Unavailable, TimedOut, StageError, StageLost.
        """
        ...
