from __future__ import annotations

import socket

from meshnode.app.hops import HopSeats

TOKEN, OTHER = bytes(16), b"\x01" * 16


class Waiting:
    """Takes what arrives and keeps it open."""

    def __init__(self) -> None:
        self.taken: list[socket.socket] = []

    async def take(self, connection: socket.socket) -> None:
        self.taken.append(connection)


async def arrive(seats: HopSeats, token: bytes) -> socket.socket:
    """Our end of a connection that came with `token`."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    await seats.arrived(token, theirs)
    return ours


def is_closed(ours: socket.socket) -> bool:
    try:
        return ours.recv(1) == b""
    except BlockingIOError:
        return False


async def test_a_connection_goes_to_whoever_waits_for_its_token() -> None:
    seats, one, two = HopSeats(), Waiting(), Waiting()
    seats.open(TOKEN, one.take)
    seats.open(OTHER, two.take)
    with await arrive(seats, TOKEN) as first, await arrive(seats, OTHER) as second:
        assert (len(one.taken), len(two.taken)) == (1, 1)
        assert not is_closed(first)
        assert not is_closed(second)
        assert seats.unknown == 0
        for connection in (*one.taken, *two.taken):
            connection.close()


async def test_an_unknown_token_is_closed_and_counted() -> None:
    seats = HopSeats()
    seats.open(OTHER, Waiting().take)
    with await arrive(seats, TOKEN) as ours:
        assert is_closed(ours)
    assert seats.unknown == 1


async def test_a_seat_that_was_closed_takes_nobody() -> None:
    seats, one = HopSeats(), Waiting()
    seats.open(TOKEN, one.take)
    seats.close(TOKEN)
    seats.close(TOKEN)
    with await arrive(seats, TOKEN) as ours:
        assert is_closed(ours)
    assert (one.taken, seats.unknown) == ([], 1)


async def test_the_last_one_that_opened_a_seat_has_it() -> None:
    seats, one, two = HopSeats(), Waiting(), Waiting()
    seats.open(TOKEN, one.take)
    seats.open(TOKEN, two.take)
    with await arrive(seats, TOKEN):
        assert (len(one.taken), len(two.taken)) == (0, 1)
        two.taken[0].close()
