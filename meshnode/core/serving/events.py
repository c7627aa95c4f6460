"""What the scheduler tells about its sequences, and its counters as one frozen view."""

from __future__ import annotations

import msgspec

from meshnode.core.serving.request import Sampled
from meshnode.errors import MeshError


class TokenReady(msgspec.Struct, frozen=True):
    """One token of a sequence; with `sampled.finish` set it was the last event of that id."""

    id: str
    sampled: Sampled


class Failed(msgspec.Struct, frozen=True):
    """A sequence ended with an error; the last event of that id."""

    id: str
    error: MeshError


Event = TokenReady | Failed


class Statistics(msgspec.Struct, frozen=True):
    """Counters of one run since its head started, and gauges of now."""

    lanes: int
    lanes_busy: int
    queued: int
    paused: int
    context: int
    cells_reserved: int
    cells_live: int
    """Positions that were handed to the stages."""
    in_flight: int
    """Microbatches without an answer now."""
    in_flight_most: int
    prompt_tokens: int
    generated_tokens: int
    microbatches: int
    finished: int
    failed: int
    cancelled: int
    pauses: int
    lanes_kept: int
    """Lanes without a request that hold what an ended one left."""
    cells_kept: int
    """Positions in them; they are freed when others need the room."""
    cached_tokens: int
    """Rows of prompts that were not computed, because a lane held them."""
    looks: int
    """How often the head looked at its lanes while one was busy: a sample, four times a second."""
    looks_filled: float
    """Sum of min(microbatches under way / stages, 1) over these looks: where the mean is below 1, stages wait."""
    rejected: dict[str, int]
    """By reason: queue_full, queue_timeout, prompt_too_long, duplicate_id, draining."""
