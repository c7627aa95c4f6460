import pytest

from meshnode.errors import PeerError
from meshnode.io.transport.gate import Gate


def test_seats_are_bounded_in_all_and_per_key_and_come_back() -> None:
    gate = Gate(in_all=3, per_key=2)
    with gate.seat("a"), gate.seat("a"):
        with pytest.raises(PeerError), gate.seat("a"):
            pass
        with gate.seat("b"), pytest.raises(PeerError), gate.seat("c"):
            pass
        assert gate.taken() == 2
    assert gate.taken() == 0


def test_a_seat_comes_back_after_an_error() -> None:
    gate = Gate(1, 1)
    with pytest.raises(KeyError), gate.seat("a"):
        raise KeyError
    with gate.seat("a"):
        assert gate.taken() == 1
