"""Revocation at this node: sign a list where there is a key for it, and shut this node's door to whom any list bars.

Invariant: nobody who is barred keeps or gets a stream here; the mediator closes the control link, this the others.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
from cryptography.hazmat.primitives.serialization import Encoding

from meshnode.core.node.events import Event, Revoked
from meshnode.core.node.mediator import Mediator
from meshnode.errors import Barred, ConfigError
from meshnode.identity.certificates import Authority
from meshnode.identity.chains import PeerIdentity, key_bytes
from meshnode.identity.ids import NodeId, is_id, node_id_of
from meshnode.identity.revocation import LISTED, sign_list
from meshnode.io.transport.stream import Stream
from meshnode.wire.messages import Revoke


class Revoking:
    """`post` hands in an event, `changed` waits until one was handled, `issuer` is the key to sign with, if any."""

    def __init__(
        self,
        mediator: Mediator,
        post: Callable[[Event], Awaitable[None]],
        changed: Callable[[], Awaitable[None]],
        issuer: Callable[[], Authority | None],
    ) -> None:
        self._mediator = mediator
        self._post = post
        self._changed = changed
        self._issuer = issuer
        self._turn = trio.Lock()
        self._streams: dict[trio.CancelScope, PeerIdentity] = {}

    def barred(self, node: NodeId) -> bool:
        """Whether a list that is known here revokes `node`."""
        return self._mediator.membership.revocations.expelled(node)

    def revoked(self, issuer: NodeId) -> bool:
        """Whether the root revoked `issuer`."""
        return self._mediator.membership.revocations.bars_issuer(issuer)

    def reason(self, peer: PeerIdentity) -> str:
        """Why `peer` is out, empty when it is not."""
        return self._mediator.membership.revocations.reason(peer.node_id, peer.issuer)

    def admit(self, peer: PeerIdentity) -> None:
        """`Barred`, which it hears, when `peer` or its issuer was revoked."""
        reason = self.reason(peer)
        if reason:
            raise Barred(f"revoked from the mesh ({reason})")

    async def revoke(self, node: NodeId) -> None:
        """Bar `node` from the mesh; returns when this node has acted on it. ConfigError where that is not possible."""
        issuer = self._issuer()
        if issuer is None:
            raise ConfigError(
                "this node cannot revoke: it holds no issuer key",
                "Run `meshnode revoke` on an issuer: `meshnode issuer list` shows them.",
            )
        if self.revoked(node_id_of(key_bytes(issuer.certificate))):
            raise ConfigError("the root of this mesh revoked the issuer on this node", "Revoke on another issuer.")
        if not is_id(node):
            raise ConfigError("that is no node id", "`meshnode peers` lists them")
        if node == self._mediator.node:
            raise ConfigError("a node does not revoke itself", "Stop it, or revoke it on another issuer.")
        if not self._mediator.membership.revocations.bars(node):
            chain = (issuer.certificate.public_bytes(Encoding.DER),)
            await self._list(issuer, chain, node, lambda: self._mediator.membership.revocations.bars(node))

    async def revoke_issuer(self, root: Authority, issuer: NodeId) -> None:
        """Bar `issuer`, and whoever has its certificate from it, by the root's own list."""
        if not is_id(issuer):
            raise ConfigError("that is no issuer's id", "`meshnode issuer list` shows them")
        author = self._mediator.authority.admit(self._mediator.authority.chain)
        if issuer == author.issuer:
            raise ConfigError(
                "that issuer signed this node's own certificate: this node would be out itself",
                "Put the root key on a member that another issuer let in, and revoke it there.",
            )
        await self._list(root, (), issuer, lambda: self.revoked(issuer))

    async def _list(self, signer: Authority, chain: tuple[bytes, ...], who: NodeId, done: Callable[[], bool]) -> None:
        async with self._turn:  # a second list with the same version would replace the first
            if done():
                return
            await self._post(Revoked(self._signed(signer, chain, who)))
            while not done():
                await self._changed()

    def _signed(self, signer: Authority, chain: tuple[bytes, ...], who: NodeId) -> Revoke:
        """The signer's next list: the present one and `who`."""
        present = self._mediator.membership.revocations.of(node_id_of(key_bytes(signer.certificate)))
        nodes = {*(present.nodes if present is not None else ()), who}
        if len(nodes) > LISTED:
            raise ConfigError(f"{LISTED} nodes are revoked already", "Make a new mesh, and let in who belongs to it.")
        version = present.version + 1 if present is not None else 1
        mesh = self._mediator.authority.mesh
        return Revoke(chain, *sign_list(signer.key, mesh, version, sorted(nodes)))

    async def guard(self, stream: Stream, serve: Callable[[Stream], Awaitable[None]]) -> None:
        """Serve a member's stream until it is barred. `Barred` when it is already."""
        self.admit(stream.peer)
        with trio.CancelScope() as scope:
            self._streams[scope] = stream.peer
            try:
                await serve(stream)
            finally:
                del self._streams[scope]

    async def watch(self, tell_stages: Callable[[Callable[[NodeId], bool]], Awaitable[None]]) -> None:
        """End the streams of whoever becomes barred, and have the stages end theirs, until cancelled."""
        seen: set[bytes] = set()
        while True:
            lists = {record.signature for record in self._mediator.membership.revocations.records.values()}
            if lists != seen:
                seen = lists
                for scope, peer in self._streams.items():
                    if self.reason(peer):
                        scope.cancel()
                await tell_stages(self.barred)
            await self._changed()
