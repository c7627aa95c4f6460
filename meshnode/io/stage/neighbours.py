"""Who a stage talks to: its key and certificate, the names of both neighbours, and the handshakes with them.

Invariant: a stream is used only after both ends proved the planned name and said the same fence, under the
credentials that are still in force when the handshake ends; at most STAGE_HANDSHAKES descriptors wait for that.
"""

from __future__ import annotations

import socket
import ssl
import threading
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from meshnode.errors import LinkLost, MeshError, StageError, StaleFence
from meshnode.identity.ids import NodeId
from meshnode.io.stage.computing import Hops
from meshnode.io.stage.streams import FrameReader, FrameSender, authenticate, greet_downstream, greet_upstream
from meshnode.io.stage.wiring import Wiring
from meshnode.wire import limits
from meshnode.wire.fence import Fence, is_fence
from meshnode.wire.stage_protocol import DOWNSTREAM, UPSTREAM, Adopt, Credentials


def _node(name: str) -> str:
    """The node in the name of a stage or head (identity.certificates): its last label but one."""
    return name.split(".")[-2]


@dataclass(frozen=True, eq=False)
class _Standing:
    """Credentials in force. Compared by identity: a later set, even an equal one, makes this one stale."""

    fence: Fence
    names: dict[str, str]
    contexts: dict[str, ssl.SSLContext]


class Neighbours:
    """Both streams of one stage. Methods are thread-safe; `connect` blocks for a handshake."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._lock = threading.Lock()
        self._key = Ed25519PrivateKey.generate()
        self._standing: _Standing | None = None
        self._waiting = 0
        self._barred: set[str] = set()
        self._half: dict[str, FrameReader | FrameSender] = {}
        self._hops: Hops | None = None

    def public_key(self) -> bytes:
        """DER SubjectPublicKeyInfo."""
        return self._key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def install(self, credentials: Credentials | Adopt) -> None:
        """Take a certificate for the own key; streams made under the former one end. Raises StageError."""
        if not is_fence(credentials.fence):
            raise StageError("malformed", "the fence is no fence")
        try:
            chain, root = credentials.chain, credentials.root
            server = self._wiring.tls_context(True, chain, self._key, root)
            client = self._wiring.tls_context(False, chain, self._key, root)
        except (OSError, ValueError) as error:
            raise StageError("bad_credentials", f"the certificates cannot be used: {error}") from None
        names = {UPSTREAM: credentials.upstream_name, DOWNSTREAM: credentials.downstream_name}
        self.drop()
        with self._lock:
            if self._barred & {_node(name) for name in names.values()}:
                raise StageError("barred", "a neighbour's node was revoked")
            self._standing = _Standing(credentials.fence, names, {UPSTREAM: server, DOWNSTREAM: client})

    def bar(self, nodes: tuple[NodeId, ...]) -> None:
        """Nodes that were revoked: with one of them as a neighbour this stage is of no use any more."""
        with self._lock:
            self._barred.update(nodes)  # bounded by whom the node names: neighbours
            standing = self._standing
        if standing is not None and not self._barred.isdisjoint(map(_node, standing.names.values())):
            self.drop()

    def drop(self) -> None:
        """End both streams, and those that wait for the other."""
        with self._lock:
            half, self._half = self._half, {}
            hops, self._hops = self._hops, None
            self._standing = None
        for stream in half.values():
            stream.close()
        if hops is not None:
            hops.interrupt()

    def forget(self, hops: Hops) -> None:
        """These streams have ended; new ones may come."""
        with self._lock:
            if self._hops is hops:
                self._hops = None

    def reserve(self, side: str) -> None:
        """Before `connect`: take one of the few places for descriptors that wait. Raises StageError."""
        with self._lock:
            if side not in (UPSTREAM, DOWNSTREAM):
                raise StageError("malformed", "a stage has an upstream and a downstream side")
            if self._standing is None:
                raise StageError("no_credentials", "neighbours come after credentials")
            if self._hops is not None or side in self._half:
                raise StageError("already_connected", f"the {side} stream is there already")
            if self._waiting >= limits.STAGE_HANDSHAKES:
                raise StageError("too_many_handshakes", f"{self._waiting} connections wait for their handshake")
            self._waiting += 1

    def connect(self, side: str, raw: socket.socket) -> Hops | None:
        """Handshake and greeting over `raw` (taken over); both streams once the second one stands, else None.

        Gives the reserved place back. Raises StageError with reason handshake_failed, wrong_peer, stale_fence.
        """
        try:
            with self._lock:
                standing = self._standing
            if standing is None:
                raw.close()
                raise StageError("stale_fence", "the credentials were withdrawn")
            stream = self._authenticated(side, raw, standing)
            return self._join(side, stream, standing)
        finally:
            with self._lock:
                self._waiting -= 1

    def _authenticated(self, side: str, raw: socket.socket, standing: _Standing) -> FrameReader | FrameSender:
        def check(der: bytes | None) -> None:
            self._wiring.check_peer(der, standing.names[side])

        stream: ssl.SSLSocket | None = None
        try:
            stream = authenticate(raw, standing.contexts[side], side == UPSTREAM, check)
            if side == UPSTREAM:
                return greet_upstream(stream, standing.fence)
            greet_downstream(stream, standing.fence)
            # From now on it sends heartbeats: the next stage may be complete, and listen, long before this one.
            return FrameSender(stream, standing.fence)
        except MeshError as error:
            if stream is not None:
                stream.close()
            reasons: dict[type[MeshError], str] = {LinkLost: "handshake_failed", StaleFence: "stale_fence"}
            raise StageError(reasons.get(type(error), "wrong_peer"), str(error)) from None

    def _join(self, side: str, stream: FrameReader | FrameSender, standing: _Standing) -> Hops | None:
        with self._lock:
            if self._standing is not standing or side in self._half or self._hops is not None:
                stream.close()
                raise StageError("stale_fence", "other credentials or another stream came meanwhile")
            self._half[side] = stream
            if len(self._half) < 2:
                return None
            reader, sender = self._half[UPSTREAM], self._half[DOWNSTREAM]
            assert isinstance(reader, FrameReader)
            assert isinstance(sender, FrameSender)
            self._half = {}
            hops = self._hops = Hops(standing.fence, reader, sender)
        sender.call_when_broken(hops.downstream_broke)
        return hops
