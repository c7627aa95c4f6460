from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.wire.fence import Fence, RunId, Term, is_fence, run_id


@given(st.binary(min_size=8, max_size=8), st.integers(1, 2**64 - 1))
def test_a_drawn_run_with_any_term_is_well_formed(raw: bytes, term: int) -> None:
    assert is_fence(Fence(Term(term), run_id(raw)))
    assert bytes.fromhex(run_id(raw)) == raw


@pytest.mark.parametrize(
    ("term", "run"),
    [
        (0, "0123456789abcdef"),
        (-1, "0123456789abcdef"),
        (2**64, "0123456789abcdef"),
        (1, ""),
        (1, "0123456789abcde"),
        (1, "0123456789abcdef0"),
        (1, "0123456789ABCDEF"),
        (1, "0123456789abcde."),
        (1, "0123456789abcde\u0661"),
        (1, " 123456789abcdef"),
    ],
)
def test_what_a_peer_could_make_up_is_not(term: int, run: str) -> None:
    assert not is_fence(Fence(Term(term), RunId(run)))


def test_fences_are_ordered_by_term_and_equal_only_as_a_whole() -> None:
    low, high = run_id(bytes(8)), run_id(b"\xff" * 8)
    assert Fence(Term(1), high) < Fence(Term(2), low)
    assert Fence(Term(1), low) != Fence(Term(1), high)
    assert str(Fence(Term(2), low)) == "term 2 run 0000000000000000"
