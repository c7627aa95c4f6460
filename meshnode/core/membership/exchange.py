"""Pull and anti-entropy: two nodes find out what they do not both have, and fetch it.

    Summary(root) -> Buckets(hashes) -> Holding(buckets that differ) -> Have + Want of the difference

Invariant: every answer is bounded by what this node holds, and what two linked nodes hold differs for at most two
rounds of anti-entropy after either stops changing.
"""

from __future__ import annotations

from meshnode.core.membership.digest import Digest, bucket_of
from meshnode.core.membership.gossip import Gossip
from meshnode.core.membership.roster import Roster
from meshnode.core.membership.voice import Voice
from meshnode.identity.ids import NodeId
from meshnode.wire.limits import GOSSIP_BUCKETS, GOSSIP_IDS
from meshnode.wire.messages import (
    Announce,
    AnyMessage,
    Buckets,
    Have,
    Holding,
    Introduce,
    Summary,
    Want,
    WhoIs,
)

FEW = 32
"""Ids told at once without comparing buckets first: 600 bytes cost less than a round trip."""
WANTED = 128
"""Contents asked for, and given, at once: 100 KB, a quarter of the messages that may wait on a link."""

Request = WhoIs | Have | Want | Summary | Buckets | Holding


class Exchange:
    """Answers of this node to those who compare."""

    def __init__(self, roster: Roster, voice: Voice, digest: Digest, gossip: Gossip) -> None:
        self._roster = roster
        self._voice = voice
        self._digest = digest
        self._gossip = gossip

    def summary(self) -> Summary:
        """What starts a comparison."""
        return Summary(self._digest.root())

    def answer(self, peer: NodeId, message: Request, now: float) -> list[AnyMessage]:
        """What to send back."""
        match message:
            case Summary():
                return self._summary(message)
            case Buckets():
                pairs = zip(message.hashes, self._digest.hashes(), strict=True)
                return [self._holding(tuple(index for index, (theirs, own) in enumerate(pairs) if theirs != own))]
            case Holding():
                return self._difference(peer, message, now)
            case Have():
                return self._want(peer, message.ids, now)
            case Want():
                return [found for identity in message.ids[:WANTED] if (found := self._content(identity, now))]
            case WhoIs():
                return self._introduce(message, now)

    def _summary(self, message: Summary) -> list[AnyMessage]:
        if message.root == self._digest.root():
            return []
        if len(self._digest.items) <= FEW:
            return [self._holding(tuple(range(GOSSIP_BUCKETS)))]
        return [Buckets(self._digest.hashes())]

    def _holding(self, buckets: tuple[int, ...]) -> Holding:
        return Holding(buckets, self._digest.within(buckets)[:GOSSIP_IDS])

    def _difference(self, peer: NodeId, message: Holding, now: float) -> list[AnyMessage]:
        theirs = set(message.ids)
        lacking = tuple(identity for identity in self._digest.within(message.buckets) if identity not in theirs)
        asked = [identity for identity in message.ids if bucket_of(identity) in message.buckets]
        told: list[AnyMessage] = [Have(lacking[:GOSSIP_IDS])] if lacking else []
        return told + self._want(peer, tuple(asked), now)

    def _want(self, peer: NodeId, ids: tuple[bytes, ...], now: float) -> list[AnyMessage]:
        wanted = self._gossip.named(peer, ids, WANTED, now)
        return [Want(wanted)] if wanted else []

    def _content(self, identity: bytes, now: float) -> AnyMessage | None:
        item = self._digest.items.get(identity)
        if isinstance(item, Announce) and item is not self._voice.record:
            return self._roster.outgoing(item.author, now)
        return item

    def _introduce(self, message: WhoIs, now: float) -> list[AnyMessage]:
        told: list[AnyMessage] = []
        for author in message.authors[:WANTED]:
            if author == self._roster.authority.node and self._voice.record is not None:
                told += [Introduce(self._roster.authority.chain), self._voice.record]
            elif author in self._roster.chains:
                record = self._roster.outgoing(author, now)
                told += [Introduce(self._roster.chains[author]), *([record] if record is not None else [])]
        return told
