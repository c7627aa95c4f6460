import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.errors import PeerError
from meshnode.identity.domains import Domain, sign, verify
from meshnode.identity.ids import mesh_id_of

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
MESH, OTHER_MESH = mesh_id_of(b"one"), mesh_id_of(b"two")


def test_a_signature_is_valid_for_its_domain_mesh_and_bytes_only() -> None:
    signature = sign(KEY, Domain.ANNOUNCEMENT, MESH, b"data")
    public = KEY.public_key()
    verify(public, Domain.ANNOUNCEMENT, MESH, b"data", signature)
    stranger = Ed25519PrivateKey.generate().public_key()
    for key, domain, mesh, data, mark in (
        (public, Domain.JOIN, MESH, b"data", signature),
        (public, Domain.ANNOUNCEMENT, OTHER_MESH, b"data", signature),
        (public, Domain.ANNOUNCEMENT, MESH, b"datA", signature),
        (public, Domain.ANNOUNCEMENT, MESH, b"data", b""),
        (stranger, Domain.ANNOUNCEMENT, MESH, b"data", signature),
    ):
        with pytest.raises(PeerError):
            verify(key, domain, mesh, data, mark)


def test_domain_labels_differ_and_none_holds_the_separator() -> None:
    labels = [domain.value for domain in Domain]
    assert len(set(labels)) == len(labels)
    assert all(label.startswith("meshnode/v1/") and "\0" not in label for label in labels)
