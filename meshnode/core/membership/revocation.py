"""The revocation lists known here, and who is barred by them.

Invariant: of each issuer the highest version counts and no lower one is ever taken again; of two with one version the
higher id wins, so that every order of arrival ends with the same lists. A revoked issuer's list counts nothing.
"""

from __future__ import annotations

import msgspec

from meshnode.core.membership.announcement import Author, Authority
from meshnode.core.membership.digest import id_of
from meshnode.errors import ConfigError, PeerError
from meshnode.identity.ids import NodeId, short
from meshnode.identity.revocation import RevocationList
from meshnode.wire.messages import Revoke

ISSUERS = 33
"""Whose lists are kept: the root, the issuer that made the mesh with it, and as many as it appoints (identity/issuers:
31). A home mesh has two."""

EXPELLED = 512
"""Nodes remembered whose issuer was revoked: as many as are remembered at all (roster.MEMBERS)."""


class Revocations:
    """All lists, by issuer."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self.records: dict[NodeId, Revoke] = {}
        self._lists: dict[NodeId, RevocationList] = {}
        self._barred: frozenset[NodeId] = frozenset()
        self._issuers: frozenset[NodeId] = frozenset()
        self._expelled: dict[NodeId, NodeId] = {}
        self.changes = 0
        """How often others became `expelled`."""

    def offer(self, record: Revoke) -> tuple[bool, Revoke | None]:
        """Merge one list: whether it is news, and the one it replaces. Raises PeerError for what no issuer signed."""
        told = self._authority.revocations(record.chain, record.body, record.signature)
        known = self._lists.get(told.issuer)
        if known is not None:
            before = self.records[told.issuer]
            if (told.version, id_of(record)) <= (known.version, id_of(before)):
                return False, None
        elif len(self._lists) >= ISSUERS:
            raise PeerError("too many issuers have revocation lists")
        replaced = self.records.get(told.issuer)
        self.records[told.issuer] = record
        self._lists[told.issuer] = told
        self._unite()
        return True, replaced

    def bars(self, node: NodeId, author: Author | None = None) -> bool:
        """Whether `node`, or who issued its certificate, is revoked."""
        return node in self._barred or (author is not None and self.bars_issuer(author.issuer))

    def reason(self, node: NodeId, issuer: NodeId | None = None) -> str:
        """Why `node`, with a certificate of `issuer`, is out, as it may hear it; empty when it is not."""
        if issuer is not None and self.bars_issuer(issuer):
            return f"the root of the mesh revoked its issuer {short(issuer)}"
        if node not in self._barred:
            return ""
        by = next(each for each, told in self._lists.items() if node in told.nodes and not self.bars_issuer(each))
        return (
            "the root of the mesh revoked it"
            if by == NodeId(self._authority.mesh)
            else f"issuer {short(by)} revoked it"
        )

    def bars_issuer(self, issuer: NodeId) -> bool:
        """Whether the root revoked `issuer`, and with it all that it signed."""
        return issuer in self._issuers

    def expel(self, node: NodeId, author: Author | None) -> None:
        """Remember who let `node` in, which is forgotten otherwise, if that is why it is out."""
        if author is not None and self.bars_issuer(author.issuer) and len(self._expelled) < EXPELLED:
            self._expelled[node] = author.issuer
            self.changes += 1

    def readmit(self, node: NodeId) -> None:
        """It has a certificate of another issuer."""
        if self._expelled.pop(node, None) is not None:
            self.changes += 1

    def expelled(self, node: NodeId) -> bool:
        """Whether `node` is out, by its key or by whom it was last seen to be let in."""
        return node in self._barred or self._expelled.get(node) in self._issuers

    def of(self, issuer: NodeId) -> RevocationList | None:
        """The list of `issuer` that counts at present."""
        return self._lists.get(issuer)

    def encode(self) -> bytes:
        """What must survive a restart."""
        return msgspec.msgpack.encode([(each.chain, each.body, each.signature) for each in self.records.values()])

    def restore(self, data: bytes) -> None:
        """Take back what `encode` wrote. Raises ConfigError for a damaged file."""
        try:
            kept = msgspec.msgpack.decode(data, type=list[tuple[tuple[bytes, ...], bytes, bytes]])
            for chain, body, signature in kept:
                self.offer(Revoke(chain, body, signature))
        except (msgspec.MsgspecError, ValueError, PeerError) as error:
            raise ConfigError(f"the revocation lists on disk are damaged: {error}") from None

    def _unite(self) -> None:
        root = self._lists.get(NodeId(self._authority.mesh))
        self._issuers = frozenset(root.nodes if root is not None else ())
        counted = [told for issuer, told in self._lists.items() if issuer not in self._issuers]
        self._barred = frozenset(node for told in counted for node in told.nodes)
        self.changes += 1
