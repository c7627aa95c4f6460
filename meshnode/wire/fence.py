"""The fence: which term of a deployment and which run of it an order or a frame belongs to.

Every control order and every activation frame carries one; what is not granted here is refused. A term is counted by
claims, a run id is drawn once per claim, so that two claims of one term can never be taken for each other.
"""

from __future__ import annotations

from typing import NewType

import msgspec

Term = NewType("Term", int)
"""u64; 1 + the highest that any participant has promised."""

RunId = NewType("RunId", str)
"""16 hexadecimal digits (8 random bytes); also the run label in stage certificates."""


class Fence(msgspec.Struct, frozen=True, order=True):
    """(term, run id) of one loaded generation of a deployment."""

    term: Term
    run: RunId

    def __str__(self) -> str:
        return f"term {self.term} run {self.run}"


def run_id(raw: bytes) -> RunId:
    """The run id of 8 random bytes."""
    assert len(raw) == 8
    return RunId(raw.hex())


def is_fence(fence: Fence) -> bool:
    """Whether a fence read from a peer is well formed."""
    run = fence.run
    return 0 < fence.term < 2**64 and len(run) == 16 and all(c in "0123456789abcdef" for c in run)
