"""Everything this node holds and passes on, by id, and short hashes that two nodes compare.

Invariant: equal roots mean equal sets of ids (up to a collision of SHA-256 cut to 16 bytes).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from meshnode.wire.limits import GOSSIP_BUCKETS, GOSSIP_ID
from meshnode.wire.messages import Announce, DemandRecord, Revoke, Suspect

Item = Announce | Suspect | Revoke | DemandRecord

HASH = 8
"""Bytes of a bucket's hash and of the root: an accident in 2^64 lasts until the next change of the bucket."""


def id_of(item: Item) -> bytes:
    """The id of a signed thing: of what was signed, so that it is the same wherever it passes."""
    return hashlib.sha256(item.body).digest()[:GOSSIP_ID]


def bucket_of(identity: bytes) -> int:
    """The part that an id belongs to: its first half byte."""
    return identity[0] >> 4


class Digest:
    """The items by id, in buckets whose hashes are computed when they are asked for."""

    def __init__(self) -> None:
        self.items: dict[bytes, Item] = {}
        self._buckets: list[set[bytes]] = [set() for _ in range(GOSSIP_BUCKETS)]
        self._hashes: list[bytes | None] = [None] * GOSSIP_BUCKETS
        self._root: bytes | None = None

    def add(self, item: Item) -> bytes:
        """Hold `item`; its id."""
        identity = id_of(item)
        self.items[identity] = item
        self._touch(identity).add(identity)
        return identity

    def remove(self, identity: bytes) -> None:
        """Hold it no longer."""
        if self.items.pop(identity, None) is not None:
            self._touch(identity).discard(identity)

    def hashes(self) -> tuple[bytes, ...]:
        """One hash for each bucket."""
        return tuple(self._hash(bucket) for bucket in range(GOSSIP_BUCKETS))

    def root(self) -> bytes:
        """One hash for all."""
        if self._root is None:
            self._root = hashlib.sha256(b"".join(self.hashes())).digest()[:HASH]
        return self._root

    def within(self, buckets: Iterable[int]) -> tuple[bytes, ...]:
        """The ids in these buckets, sorted."""
        return tuple(sorted(identity for bucket in set(buckets) for identity in self._buckets[bucket]))

    def _touch(self, identity: bytes) -> set[bytes]:
        bucket = bucket_of(identity)
        self._hashes[bucket] = self._root = None
        return self._buckets[bucket]

    def _hash(self, bucket: int) -> bytes:
        known = self._hashes[bucket]
        if known is None:
            known = hashlib.sha256(b"".join(sorted(self._buckets[bucket]))).digest()[:HASH]
            self._hashes[bucket] = known
        return known
