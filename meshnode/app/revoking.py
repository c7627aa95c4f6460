"""Revocation at this node: sign a list where there is an issuer key, and shut this node's door to whom any list bars.

Invariant: nobody who is barred keeps or gets a stream here; the mediator closes the control link, this the others.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio
from cryptography.hazmat.primitives.serialization import Encoding

from meshnode.core.node.events import Event, Revoked
from meshnode.core.node.mediator import Mediator
from meshnode.errors import ConfigError, PeerError
from meshnode.identity.certificates import Authority
from meshnode.identity.chains import key_bytes
from meshnode.identity.ids import NodeId, is_id, node_id_of
from meshnode.identity.revocation import LISTED, sign_list
from meshnode.io.transport.stream import Stream
from meshnode.wire.messages import Revoke

log = logging.getLogger("meshnode.identity")

REASON = "this node's certificate was revoked"
"""What the revoked node hears."""


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
        self._streams: dict[trio.CancelScope, NodeId] = {}
        self._told: set[NodeId] = set()

    def barred(self, node: NodeId) -> bool:
        """Whether a list that is known here revokes `node`."""
        return self._mediator.membership.barred(node)

    def admit(self, node: NodeId) -> None:
        """PeerError, which it hears, when `node` is barred. Logged once a node: it redials for ever."""
        if not self.barred(node):
            return
        if node not in self._told:  # bounded by the lists
            self._told.add(node)
            log.warning("node %s dials this one and is refused: its certificate was revoked", node)
        raise PeerError(REASON)

    async def revoke(self, node: NodeId) -> None:
        """Bar `node` from the mesh; returns when this node has acted on it. ConfigError where that is not possible."""
        issuer = self._issuer()
        if issuer is None:
            raise ConfigError(
                "this node cannot revoke: it holds no issuer key",
                "Run `meshnode revoke` on the machine that made the mesh.",
            )
        if not is_id(node):
            raise ConfigError("that is no node id", "`meshnode peers` lists them")
        if node == self._mediator.node:
            raise ConfigError("a node does not revoke itself", "Stop it, or revoke it on another issuer.")
        async with self._turn:  # a second list with the same version would replace the first
            if self.barred(node):
                return
            await self._post(Revoked(self._signed(issuer, node)))
            while not self.barred(node):
                await self._changed()

    def _signed(self, issuer: Authority, node: NodeId) -> Revoke:
        """This issuer's next list: the present one and `node`."""
        present = self._mediator.membership.revocations.of(node_id_of(key_bytes(issuer.certificate)))
        nodes = {*(present.nodes if present is not None else ()), node}
        if len(nodes) > LISTED:
            raise ConfigError(f"{LISTED} nodes are revoked already", "Make a new mesh, and let in who belongs to it.")
        version = present.version + 1 if present is not None else 1
        mesh = self._mediator.authority.mesh
        body, signature = sign_list(issuer.key, mesh, version, sorted(nodes))
        return Revoke((issuer.certificate.public_bytes(Encoding.DER),), body, signature)

    async def guard(self, stream: Stream, serve: Callable[[Stream], Awaitable[None]]) -> None:
        """Serve a member's stream until it is barred. PeerError when it is already."""
        if self.barred(stream.peer.node_id):
            raise PeerError(REASON)
        with trio.CancelScope() as scope:
            self._streams[scope] = stream.peer.node_id
            try:
                await serve(stream)
            finally:
                del self._streams[scope]

    async def watch(self) -> None:
        """End the streams of whoever becomes barred, until cancelled."""
        seen: set[bytes] = set()
        while True:
            lists = {record.signature for record in self._mediator.membership.revocations.records.values()}
            if lists != seen:
                seen = lists
                for scope, node in self._streams.items():
                    if self.barred(node):
                        scope.cancel()
            await self._changed()
