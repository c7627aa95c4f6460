"""Names of nodes and meshes: SHA-256 of a public key, in base32.

Invariant: an id is 52 characters of `a-z2-7` and is compared whole; the short form is for people only.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import NewType

NodeId = NewType("NodeId", str)
"""SHA-256 of the node's public key (DER SubjectPublicKeyInfo), base32 lower case, no padding: 52 letters."""

MeshId = NewType("MeshId", str)
"""The same of the mesh root's public key."""

ID_CHARACTERS = 52
"""256 bits in base32 without padding; short enough for one DNS label (63)."""

SHORT_CHARACTERS = 8
"""40 bits: enough to tell the nodes of one mesh apart on a screen, never used to compare."""

# The last of 52 characters carries one bit of the digest: only `a` and `q` are canonical.
_ID = re.compile(r"[a-z2-7]{51}[aq]")


def node_id_of(spki: bytes) -> NodeId:
    """The id of the key whose DER SubjectPublicKeyInfo is `spki`."""
    return NodeId(_digest(spki))


def mesh_id_of(spki: bytes) -> MeshId:
    """The id of the mesh whose root key has the DER SubjectPublicKeyInfo `spki`."""
    return MeshId(_digest(spki))


def is_id(text: str) -> bool:
    """True when `text` is a well-formed node or mesh id."""
    return _ID.fullmatch(text) is not None


def short(name: NodeId | MeshId) -> str:
    """The first 8 characters, for people."""
    return name[:SHORT_CHARACTERS]


def id_bytes(name: NodeId | MeshId) -> bytes:
    """The 32 bytes of a well-formed id; `ValueError` otherwise."""
    if not is_id(name):
        raise ValueError("not an id: 52 characters of a-z2-7 are expected")
    return base64.b32decode(name.upper() + "====")


def _digest(spki: bytes) -> str:
    return base64.b32encode(hashlib.sha256(spki).digest()).decode().rstrip("=").lower()
