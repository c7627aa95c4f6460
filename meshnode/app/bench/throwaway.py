"""Identities for one measurement: a mesh that nobody ever joins."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key

from meshnode.identity.certificates import (
    Authority,
    Role,
    head_name,
    make_issuer,
    make_node,
    make_root,
    make_stage,
    stage_name,
)
from meshnode.identity.credentials import Credentials
from meshnode.identity.ids import NodeId, node_id_of
from meshnode.identity.keys import spki_of
from meshnode.wire.fence import Fence, Term, run_id


def member_credentials(count: int) -> list[Credentials]:
    """Members of one fresh mesh."""
    now = datetime.now(UTC)
    root_key, issuer_key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    root = make_root(root_key, now)
    issuer = make_issuer(Authority(root, root_key), issuer_key.public_key(), now)
    members = []
    for _ in range(count):
        key = Ed25519PrivateKey.generate()
        node = make_node(Authority(issuer, issuer_key), key.public_key(), Role.MEMBER, now)
        members.append(Credentials(key, (node, issuer), root))
    return members


@dataclass(frozen=True)
class ThrowawayMesh:
    """Root, issuer and node certificates of keys that live as long as this object."""

    node: Authority
    chain: tuple[x509.Certificate, ...]
    root_pem: bytes
    fence: Fence

    @staticmethod
    def make() -> ThrowawayMesh:
        """Fresh keys, fresh run."""
        (member,) = member_credentials(1)
        fence = Fence(Term(1), run_id(secrets.token_bytes(8)))
        return ThrowawayMesh(member.authority, member.chain, member.root_pem, fence)

    @property
    def node_id(self) -> NodeId:
        """The only node."""
        return node_id_of(spki_of(self.node.key.public_key()))

    @property
    def head_name(self) -> str:
        """Certificate name of the head of the only run."""
        return head_name(self.fence.run, self.node_id)

    def stage_name(self, stage: int) -> str:
        """Certificate name of a stage of the only run."""
        return stage_name(stage, self.fence.run, self.node_id)

    def chain_for(self, key: Ed25519PublicKey, name: str) -> bytes:
        """PEM chain of a leaf for `key`."""
        leaf = make_stage(self.node, key, name, datetime.now(UTC))
        return b"".join(item.public_bytes(Encoding.PEM) for item in (leaf, *self.chain))

    def chain_for_spki(self, spki: bytes, name: str) -> bytes:
        """PEM chain of a leaf for a key in DER SubjectPublicKeyInfo."""
        key = load_der_public_key(spki)
        assert isinstance(key, Ed25519PublicKey)
        return self.chain_for(key, name)
