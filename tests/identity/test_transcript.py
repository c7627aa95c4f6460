from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.errors import PeerError
from meshnode.identity.domains import Domain
from meshnode.identity.ids import mesh_id_of
from meshnode.identity.keys import spki_of
from meshnode.identity.transcript import Transcript, fingerprint

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
TRANSCRIPT = Transcript(
    mesh_id_of(b"mesh"), b"invite-8", b"i" * 32, b"j" * 32, fingerprint(b"leaf"), spki_of(KEY.public_key())
)
OTHERS = [
    replace(TRANSCRIPT, mesh_id=mesh_id_of(b"other")),
    replace(TRANSCRIPT, invite_id=b"invite-9"),
    replace(TRANSCRIPT, issuer_nonce=b"k" * 32),
    replace(TRANSCRIPT, joiner_nonce=b"k" * 32),
    replace(TRANSCRIPT, leaf_fingerprint=fingerprint(b"other")),
    replace(TRANSCRIPT, domain=Domain.RENEWAL),
]


def test_a_proof_holds_for_its_own_transcript_and_key_only() -> None:
    mac = TRANSCRIPT.mac(b"k" * 32)
    assert TRANSCRIPT.proves(b"k" * 32, mac)
    assert not TRANSCRIPT.proves(b"x" * 32, mac)
    stranger = Ed25519PrivateKey.generate()
    others = [*OTHERS, replace(TRANSCRIPT, public_key=spki_of(stranger.public_key()))]
    assert not any(other.proves(b"k" * 32, mac) for other in others)


def test_a_signature_holds_for_its_own_transcript_only() -> None:
    signature = TRANSCRIPT.sign(KEY)
    TRANSCRIPT.check_signature(signature)
    for other in OTHERS:
        with pytest.raises(PeerError):
            other.check_signature(signature)
    with pytest.raises(PeerError):
        TRANSCRIPT.check_signature(TRANSCRIPT.sign(Ed25519PrivateKey.generate()))


def test_parts_of_other_lengths_are_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        replace(TRANSCRIPT, issuer_nonce=b"i" * 31)
