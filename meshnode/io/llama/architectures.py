"""What must be known about an architecture before a slice of it may run (the table of docs/decisions: architectures).

One row a family; an architecture without a row is never guessed at: it is served whole, and said so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class WayIn(StrEnum):
    """How activations enter a slice."""

    ROWS = "rows"
    OVERWRITE = "overwrite"


@dataclass(frozen=True)
class Architecture:
    """One row: traits of llama.cpp's graph builder of that name."""

    tap: str = "l_out"
    way_in: WayIn = WayIn.ROWS


PLAIN = Architecture()
TABLE: Mapping[str, Architecture] = MappingProxyType(dict.fromkeys(("llama", "qwen2", "qwen3"), PLAIN))
