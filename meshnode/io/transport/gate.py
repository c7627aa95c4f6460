"""How many connections may be in their handshake: what strangers can hold is bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from meshnode.errors import PeerError


class Gate:
    """Counts seats in all and per key; a refused entry raises at once, nobody waits."""

    def __init__(self, in_all: int, per_key: int) -> None:
        self._in_all = in_all
        self._per_key = per_key
        self._seats: Counter[str] = Counter()

    @contextmanager
    def seat(self, key: str) -> Iterator[None]:
        """Hold one seat of `key`; `PeerError` when there is none."""
        if self._seats.total() >= self._in_all or self._seats[key] >= self._per_key:
            raise PeerError("too many connections at once")
        self._seats[key] += 1
        try:
            yield
        finally:
            self._seats[key] -= 1
            if not self._seats[key]:
                del self._seats[key]

    def taken(self) -> int:
        """Seats in use."""
        return self._seats.total()
