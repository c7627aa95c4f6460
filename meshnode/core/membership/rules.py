"""Rules of membership that the simulator switches off one at a time, to prove that its sweep finds their absence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """All True in a node; nothing else is ever run but in a simulation."""

    signatures: bool = True
    anti_entropy: bool = True
    refutation: bool = True


RULES = Rules()
"""Those of a node."""
