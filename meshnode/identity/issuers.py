"""What the holder of the root key remembers of whom it made an issuer, so that it can list and revoke them.

Invariant: an appointment is recorded, durably, before its certificate leaves the machine that signed it.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from meshnode.errors import ConfigError
from meshnode.identity.ids import NodeId

APPOINTED = 31
"""Issuers that one root makes: with the root and the first issuer, as many as have revocation lists
(core.membership.revocation)."""


class Appointment(msgspec.Struct, frozen=True):
    """One node that was made an issuer. Renewed by another one of the same node and key."""

    node: NodeId
    name: str
    """What people called the node then."""
    issuer: NodeId
    """Hash of the key that it issues with, which is not its node key."""
    expires: datetime


def appointed(known: tuple[Appointment, ...], new: Appointment) -> tuple[Appointment, ...]:
    """With `new`, in place of an older one of the same key; ConfigError when there are too many."""
    others = tuple(each for each in known if each.issuer != new.issuer)
    if len(others) >= APPOINTED:
        raise ConfigError(f"{APPOINTED} nodes were made issuers already", "A mesh needs two or three.")
    return (*others, new)


def encode_appointments(known: tuple[Appointment, ...]) -> bytes:
    """JSON, for the data directory; nothing in it is secret."""
    return msgspec.json.format(msgspec.json.encode(known))


def decode_appointments(data: bytes) -> tuple[Appointment, ...]:
    """Read back; `ValueError` when the file is damaged."""
    return msgspec.json.decode(data, type=tuple[Appointment, ...])
