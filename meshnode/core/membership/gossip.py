"""Who is told of which id next, and which ids are asked for: push of ids, pull of contents.

Up to 16 nodes an author gives its announcement to all, and whoever got it names its id to all. Above, ids go to 4
linked peers every 200 ms for 2 ceil(log2 N) rounds, to nobody twice and to nobody who named it first. Rounds keep their
distance in small meshes too: when many things happen at once, their ids travel together.

Invariant: an id is pushed a bounded number of times, and is asked for again only after the answer had its time. What
push misses, anti-entropy finds: random push alone misses somebody in 5 to 17 % of updates at 8 nodes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from meshnode.identity.ids import NodeId

SMALL = 16
"""Nodes up to which everybody is linked to everybody (NETWORK)."""
FANOUT = 4
ROUND_S = 0.2
RETRY_S = 0.3
"""After so long another peer that named the id is asked too, or whoever names it next: a lost segment is sent again
after 0.2 s at the earliest. (Measured at 32 nodes and 5 % loss: p99 of an update at all nodes is 2.4 s without.)"""
SPARE = 2
"""Others remembered for that."""
SEEN = 4096
"""Ids that came and went, so that an old one is not fetched again: 16 per member at 256 nodes, 3 s of rumours."""
ASKED = 512
"""Contents on their way: four answers of the most that is given at once."""
RUMOURS = 1024
"""Ids being told at once: two for every member remembered. Beyond, the oldest is left to anti-entropy."""

Draw = Callable[[int], bytes]


def pick(draw: Draw, among: Sequence[NodeId], count: int) -> list[NodeId]:
    """`count` of `among`, all different, by handed-in randomness."""
    left = list(among)
    picked: list[NodeId] = []
    while left and len(picked) < count:
        picked.append(left.pop(int.from_bytes(draw(4), "big") % len(left)))
    return picked


@dataclass
class Asked:
    """A content that is on its way."""

    at: float
    spare: list[NodeId] = field(default_factory=list)


@dataclass
class Rumour:
    """One id that is being told."""

    rounds: int
    told: set[NodeId] = field(default_factory=set)


class Gossip:
    """Rumours of this node and what it asked for."""

    def __init__(self, draw: Draw, held: Container[bytes]) -> None:
        self._draw = draw
        self._held = held
        self._rumours: OrderedDict[bytes, Rumour] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._asked: OrderedDict[bytes, Asked] = OrderedDict()
        self._round_at: float | None = None
        self._rounded_at = float("-inf")

    def spread(self, identity: bytes, size: int, told: set[NodeId], now: float) -> None:
        """Tell others of `identity` in a mesh of `size` nodes; `told` have it already."""
        self.saw(identity)
        rounds = 1 if size <= SMALL else 2 * (size - 1).bit_length()
        self._rumours[identity] = Rumour(rounds, set(told))
        if len(self._rumours) > RUMOURS:
            self._rumours.popitem(last=False)
        if self._round_at is None:
            self._round_at = max(now, self._rounded_at + ROUND_S)

    def saw(self, identity: bytes) -> None:
        """The content of `identity` was here: it is not asked for again."""
        self._asked.pop(identity, None)
        self._seen[identity] = None
        if len(self._seen) > SEEN:
            self._seen.popitem(last=False)

    def forgot(self, identity: bytes) -> None:
        """The content of `identity` was here and is wanted after all: whoever names it is asked for it."""
        self._seen.pop(identity, None)

    def named(self, peer: NodeId, ids: Sequence[bytes], most: int, now: float) -> tuple[bytes, ...]:
        """`peer` has `ids`; those to ask it for, at most `most`."""
        wanted: list[bytes] = []
        for identity in ids:
            rumour = self._rumours.get(identity)
            if rumour is not None:
                rumour.told.add(peer)
            if identity in self._seen or identity in self._held:
                continue
            asked = self._asked.get(identity)
            if asked is not None and now < asked.at + RETRY_S:
                if len(asked.spare) < SPARE:
                    asked.spare.append(peer)
            elif len(wanted) < most:
                self._ask(identity, Asked(now))
                wanted.append(identity)
        return tuple(wanted)

    def retries(self, now: float) -> list[tuple[NodeId, bytes]]:
        """Whom to ask for what that others did not answer in time."""
        again = []
        while self._asked:
            identity, asked = next(iter(self._asked.items()))  # in the order of asking
            if asked.at + RETRY_S > now:
                break
            del self._asked[identity]
            if asked.spare:
                again.append((asked.spare.pop(0), identity))
                self._ask(identity, Asked(now, asked.spare))
        return again

    def _ask(self, identity: bytes, asked: Asked) -> None:
        self._asked[identity] = asked
        self._asked.move_to_end(identity)
        if len(self._asked) > ASKED:
            self._asked.popitem(last=False)

    def round(self, linked: Sequence[NodeId], size: int, now: float) -> list[tuple[NodeId, tuple[bytes, ...]]]:
        """Whom to tell which ids now."""
        if self._round_at is None or now < self._round_at:
            return []
        peers = list(linked) if size <= SMALL else pick(self._draw, linked, FANOUT)
        tell = []
        for peer in peers:
            news = tuple(identity for identity, rumour in self._rumours.items() if peer not in rumour.told)
            for identity in news:
                self._rumours[identity].told.add(peer)
            if news:
                tell.append((peer, news))
        everybody = set(linked)
        for identity, rumour in list(self._rumours.items()):
            rumour.rounds -= 1
            if rumour.rounds <= 0 or everybody <= rumour.told:
                del self._rumours[identity]
        self._rounded_at = now
        self._round_at = now + ROUND_S if self._rumours else None
        return tell

    def deadline(self) -> float | None:
        """When the next round, or question, is."""
        if not self._asked:
            return self._round_at
        retry_at = next(iter(self._asked.values())).at + RETRY_S
        return retry_at if self._round_at is None else min(retry_at, self._round_at)
