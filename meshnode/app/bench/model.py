"""`meshnode bench model`: write the synthetic benchmark model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from meshnode.io.llama.synthetic import SyntheticShape, write_synthetic


def write_model(
    layers: int,
    embd: int,
    type: str,
    out: Path,
    vocabulary: int = 32_000,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a Llama-shaped model of random weights to `out`, whole or not at all. Raises ConfigError, OSError."""
    write_synthetic(SyntheticShape(layers=layers, embd=embd, type=type, vocabulary=vocabulary), out, progress)
