"""Who waits behind which hop token: the node's switchboard for incoming activation streams.

Invariant: a token is good for one seat at a time, an unknown one is closed, and nothing waits here without a bound.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

Taker = Callable[[socket.socket], Awaitable[None]]
"""Takes over a connected blocking socket whose preface was read; closes it when it does not want it."""


class HopSeats:
    """Tokens that this node's stages and heads listen on."""

    def __init__(self) -> None:
        self._seats: dict[bytes, Taker] = {}
        self.unknown = 0

    def open(self, token: bytes, taker: Taker) -> None:
        """Connections with `token` go to `taker` from now on."""
        self._seats[token] = taker

    def close(self, token: bytes) -> None:
        """Nobody waits for `token` any more."""
        self._seats.pop(token, None)

    async def arrived(self, token: bytes, connection: socket.socket) -> None:
        """Hand an accepted connection over; one with an unknown token is closed and counted."""
        taker = self._seats.get(token)
        if taker is None:
            self.unknown += 1
            connection.close()
            return
        await taker(connection)
