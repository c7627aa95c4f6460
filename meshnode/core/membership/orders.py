"""What membership asks of the mediator, in the order in which it must be done."""

from __future__ import annotations

from dataclasses import dataclass

from meshnode.identity.ids import NodeId
from meshnode.wire.messages import AnyMessage


@dataclass(frozen=True)
class Tell:
    """Send to a linked peer."""

    peer: NodeId
    message: AnyMessage


@dataclass(frozen=True)
class Dial:
    """Open a link."""

    node: NodeId


@dataclass(frozen=True)
class Drop:
    """Close the link to `peer`."""

    peer: NodeId
    reason: str


@dataclass(frozen=True)
class Lost:
    """What `node` does for others, and others for it, has ended."""

    node: NodeId
    reason: str


@dataclass(frozen=True)
class Changed:
    """The members, or what one of them says of itself, are others than before."""


@dataclass(frozen=True)
class Keep:
    """Write the revocation lists durably before anything that follows is sent."""

    revocations: bytes


@dataclass(frozen=True)
class Noted:
    """A line for the log."""

    text: str


MembershipOrder = Tell | Dial | Drop | Lost | Changed | Keep | Noted
