"""What every part of the mediator does: effects in their order, and messages to peers and to this node itself."""

from __future__ import annotations

from collections import deque

from meshnode.core.membership.gossip import SMALL
from meshnode.core.membership.membership import Membership
from meshnode.core.node import effects as do
from meshnode.identity.ids import NodeId
from meshnode.wire.messages import AnyMessage

UNSENT = 64
"""Messages that wait for a link to a partner above 16 nodes: an order and its answers for every stage it may hold."""


class Outbox:
    """Effects of the event that is being handled."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._effects: list[do.Effect] = []
        self._unsent: dict[NodeId, deque[AnyMessage]] = {}
        self.local: deque[AnyMessage] = deque()
        """Messages of this node to itself."""
        self.awaited: frozenset[NodeId] = frozenset()
        """The peers that messages wait for."""

    def take(self) -> list[do.Effect]:
        """What was decided since the last call."""
        effects, self._effects = self._effects, []
        return effects

    def do(self, effect: do.Effect) -> None:
        """One effect, behind those before it."""
        self._effects.append(effect)

    def trace(self, message: str) -> None:
        """A line for the log."""
        self.do(do.Trace(message))

    def send(self, peer: NodeId, message: AnyMessage) -> None:
        """A message; up to 16 nodes it needs a link, above, one is opened for it."""
        if peer == self._membership.node:
            self.local.append(message)
        elif self._membership.links.up(peer) or self._membership.standing.size <= SMALL:
            self.do(do.Send(peer, message))
        else:
            self._unsent.setdefault(peer, deque(maxlen=UNSENT)).append(message)
            self.awaited = frozenset(self._unsent)

    def linked(self, peer: NodeId) -> None:
        """A link to `peer` is there: what waited for it goes out."""
        waiting = self._unsent.pop(peer, None)
        if waiting is not None:
            self.awaited = frozenset(self._unsent)
            for message in waiting:
                self.do(do.Send(peer, message))

    def unlinked(self, peer: NodeId) -> None:
        """No link came to be, or it ended."""
        if self._unsent.pop(peer, None) is not None:
            self.awaited = frozenset(self._unsent)
