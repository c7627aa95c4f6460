"""A mesh made in memory, for tests: real keys, real certificates."""

from __future__ import annotations

from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.identity.certificates import Authority, Role, make_issuer, make_node, make_root
from meshnode.identity.credentials import Credentials


class TestMesh:
    """Root and issuer; `node()` makes as many members as wanted. `now` is the real time unless given."""

    __test__ = False

    def __init__(self, now: datetime | None = None) -> None:
        self.now = now or datetime.now(UTC)
        root_key, issuer_key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        self.root = Authority(make_root(root_key, self.now), root_key)
        self.issuer = Authority(make_issuer(self.root, issuer_key.public_key(), self.now), issuer_key)

    def node(self, role: Role = Role.MEMBER, now: datetime | None = None) -> Credentials:
        """Credentials of a new node."""
        key = Ed25519PrivateKey.generate()
        own = make_node(self.issuer, key.public_key(), role, now or self.now)
        return Credentials(key, (own, self.issuer.certificate), self.root.certificate)
