import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from meshnode.errors import PeerError
from meshnode.identity.keys import SPKI_BYTES, private_key_of, private_key_pem, public_key_of, spki_of
from tests.identity.mutate import mutations

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def test_a_public_key_comes_back_from_its_bytes() -> None:
    spki = spki_of(KEY.public_key())
    assert len(spki) == SPKI_BYTES
    assert spki_of(public_key_of(spki)) == spki


def test_a_key_of_another_kind_is_refused() -> None:
    other = X25519PrivateKey.generate()
    spki = other.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert len(spki) == SPKI_BYTES  # same size, other algorithm
    with pytest.raises(PeerError):
        public_key_of(spki)
    pem = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(ValueError, match="Ed25519"):
        private_key_of(pem)


def test_a_private_key_comes_back_from_its_pem() -> None:
    again = private_key_of(private_key_pem(KEY))
    assert spki_of(again.public_key()) == spki_of(KEY.public_key())


def test_damaged_public_keys_are_keys_or_peer_errors() -> None:
    for data in mutations([spki_of(KEY.public_key())]):
        try:
            assert spki_of(public_key_of(data)) == data
        except PeerError:
            pass
