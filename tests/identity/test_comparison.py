"""The number that two people compare."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshnode.errors import PeerError
from meshnode.identity.comparison import check_reveal, commit, number, spoken
from meshnode.identity.domains import Domain
from meshnode.identity.ids import mesh_id_of
from meshnode.identity.keys import SPKI_BYTES
from meshnode.identity.transcript import NO_INVITE, Transcript

OURS = Transcript(mesh_id_of(b"mesh"), NO_INVITE, b"i" * 32, b"j" * 32, b"f" * 32, b"k" * SPKI_BYTES, Domain.COMPARISON)


def test_the_number_is_this_one() -> None:
    """A change of it would let two versions of meshnode show different numbers to people."""
    assert number(OURS) == "502100"
    assert spoken("012345") == "012 345"


@pytest.mark.parametrize(
    "other",
    [
        replace(OURS, mesh_id=mesh_id_of(b"other")),
        replace(OURS, issuer_nonce=b"x" * 32),
        replace(OURS, joiner_nonce=b"x" * 32),
        replace(OURS, leaf_fingerprint=b"x" * 32),
        replace(OURS, public_key=b"x" * SPKI_BYTES),
    ],
)
def test_every_part_changes_the_number(other: Transcript) -> None:
    assert number(other) != number(OURS)


def test_only_the_nonce_that_was_committed_to_can_be_revealed() -> None:
    said = commit(OURS.mesh_id, OURS.leaf_fingerprint, OURS.issuer_nonce)
    check_reveal(OURS, said)
    with pytest.raises(PeerError, match="another nonce"):
        check_reveal(replace(OURS, issuer_nonce=b"x" * 32), said)
