"""What a person started this node for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Serve:
    """`meshnode serve MODEL`: make a mesh if there is none, and serve this file with whoever is there."""

    model: Path


@dataclass(frozen=True)
class Join:
    """`meshnode join INVITE`: become a member and offer memory."""

    invite: str


@dataclass(frozen=True)
class Resume:
    """`meshnode join` on a machine that is a member already: go on with what the data directory knows."""


Intent = Serve | Join | Resume
