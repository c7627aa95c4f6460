"""Rules of coordination that the simulator switches off one at a time, to prove that its sweep finds their absence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CoordinationRules:
    """All True in a node; nothing else is ever run but in a simulation."""

    persisted_grant: bool = True
    """A grant is on disk before it is spoken."""
    unanimity: bool = True
    """Every participant has granted before one of them is told to load."""
    ledger: bool = True
    """A grant needs room beside everything that is booked."""
    fence: bool = True
    """An order is obeyed for exactly the run that it names, and only from that run's coordinator."""
    signed_claim: bool = True
    """A claim counts only from the coordinator that it names."""
    holder_evidence: bool = True
    """Another coordinator's run is in the way until its lease ends or its holder is seen to be lost."""


COORDINATION_RULES = CoordinationRules()
"""Those of a node."""
