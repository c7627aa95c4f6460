"""What the head of one run is told when it starts: sizes, windows and waits, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from meshnode.core.serving.prefixes import Reuse

UNREAD_TOKENS: Final = 64
"""Tokens a client may lag behind before its lane rests: about a second of text; a client that stopped reading
holds its cells but costs no computing."""

RETRIES: Final = 2
"""A sequence whose microbatch failed because of another lane is computed again; a stage that goes on failing
must not keep it alive for ever."""


@dataclass(frozen=True)
class ServingOptions:
    """One pipeline as its head sees it. Impossible combinations are our own bugs (assertions)."""

    stages: int
    context: int
    """Cells of the KV cache in all; one request may use all of them."""
    vocabulary: int
    """Token ids lie in [0, vocabulary)."""
    end_tokens: frozenset[int] = field(default_factory=frozenset)
    """Tokens that end a generation."""
    lanes: int = 4
    chunk: int = 128
    """Rows of a prefill chunk: 317 tokens/s over 2 stages against 281 with 64 and 229 with 512 (SERVING)."""
    rows_per_microbatch: int = 1
    """Most decode rows batched together. On CPUs two rows in one batch cost more than two decodes of one row."""
    answer_reserve: int = 2048
    """Cells reserved for an answer at admission: longer ones grow, so that one request with a huge max_tokens does
    not hold the whole cache for an answer that ends after 50 tokens."""
    growth: int = 256
    """Cells a lane grows by: so many tokens without another look at the room; also what a new lane needs at least."""
    reuse: Reuse = Reuse.ANY
    """What the model's memory lets be used again of ended requests."""
    queue_per_lane: int = 4
    queue_wait_s: float = 10.0
    token_timeout_s: float = 30.0
    """Without progress for so long, and `row_patience_s` more for each row under way, a request has stalled."""
    row_patience_s: float = 1.0
    """A 128-row chunk of a model at the edge of slow machines takes a minute, and a token behind it waits as long;
    a stage that is dead or silent is noticed by other means within 2 s."""

    def __post_init__(self) -> None:
        assert self.stages >= 1
        assert self.lanes >= 1
        assert self.context >= 2
        assert self.chunk >= 1
        assert self.rows_per_microbatch >= 1
        assert self.vocabulary >= 1
