"""How fast this machine computes with one kind of weights: a synthetic slice, timed through the stage's own engine.

Under a CPU quota a process runs and stands still in turns of 100 ms (the kernel's period), so a time is the mean over
a window of several periods, and never the shortest step: that one would be the speed without the quota.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

from meshnode.io.llama.engine import EngineOptions, Rows, SliceEngine
from meshnode.io.llama.footprint import read_footprint

WINDOW_S: Final = 0.2
"""Two periods of a quota; on a machine without one some 40 steps."""
WINDOWS: Final = 3
"""The best of them counts: another program takes part of the machine for a moment, and is none of its properties."""
CHUNK: Final = 128
"""Rows of a prefill chunk, as runs have them."""
_CONTEXT: Final = 1024


@dataclass(frozen=True)
class Timed:
    """Microseconds of one decode step and of one full chunk, and what they were spent on."""

    weight_bytes: int
    layers: int
    decode_us: float
    prefill_us: float

    def decode_bytes_per_s(self, layer_us: float = 0.0) -> int:
        """Weights read per second, without `layer_us` of every layer."""
        return round(self.weight_bytes / max(self.decode_us - layer_us * self.layers, 1.0) * 1e6)

    @property
    def prefill_bytes_per_s(self) -> int:
        """Weights per second, times the rows that are computed at once."""
        return round(self.weight_bytes * CHUNK / self.prefill_us * 1e6)


def time_model(path: Path, threads: int) -> Timed:
    """Load the whole model at `path` and time it. Raises ModelError, StageError."""
    footprint = read_footprint(path)
    options = EngineOptions(_CONTEXT, 1, CHUNK, footprint.kv_type, footprint.flash_attention, threads)
    engine = SliceEngine.load(path, None, options, first=True, last=True)
    try:
        decode = min(_decode_us(engine) for _ in range(WINDOWS))
        prefill = min(_prefill_us(engine) for _ in range(WINDOWS))
    finally:
        engine.close()
    # The look-up of a token reads one row of the embedding: nothing beside the rest.
    weights = sum(layer.read_bytes or layer.weight_bytes for layer in footprint.layers) + footprint.output_bytes
    return Timed(weights, len(footprint.layers), decode, prefill)


def _decode_us(engine: SliceEngine) -> float:
    engine.clear(0)
    steps, begun = 0, perf_counter()
    while steps < _CONTEXT - 1 and (perf_counter() - begun < WINDOW_S or steps == 0):
        engine.decode(Rows((steps,), (0,), (True,), (1,)))
        steps += 1
    return (perf_counter() - begun) / steps * 1e6


def _prefill_us(engine: SliceEngine) -> float:
    rows = Rows(range(CHUNK), (0,) * CHUNK, (False,) * CHUNK, (1,) * CHUNK)
    chunks, begun = 0, perf_counter()
    while perf_counter() - begun < WINDOW_S:
        engine.clear(0)
        engine.decode(rows)
        chunks += 1
    return (perf_counter() - begun) / chunks * 1e6
