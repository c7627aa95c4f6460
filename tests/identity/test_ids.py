import hashlib

import pytest

from meshnode.identity.ids import NodeId, id_bytes, is_id, mesh_id_of, node_id_of, short


def test_an_id_is_the_digest_of_the_key_in_base32() -> None:
    name = node_id_of(b"key")
    assert len(name) == 52
    assert id_bytes(name) == hashlib.sha256(b"key").digest()
    assert mesh_id_of(b"key") == name


def test_the_short_form_is_the_first_eight_characters() -> None:
    assert short(NodeId("abcdefghijklmnop")) == "abcdefgh"


@pytest.mark.parametrize("text", ["", "a" * 51, "a" * 53, "A" * 52, "1" * 52, "a" * 51 + "b", "a" * 51 + "\n"])
def test_what_is_not_an_id_is_told_apart(text: str) -> None:
    assert not is_id(text)
    with pytest.raises(ValueError, match="not an id"):
        id_bytes(NodeId(text))
