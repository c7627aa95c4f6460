"""One authenticated stream: frames and raw bytes over TLS.

Invariant: whatever ends a stream comes out as `LinkLost`; whatever the peer sends wrong as `PeerError`.
"""

from __future__ import annotations

import ssl
from _ssl import ENCODING_DER  # what `peer_identity` needs is private until 3.13
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import trio

from meshnode.errors import LinkLost, PeerError
from meshnode.identity.chains import PeerIdentity, key_bytes, parse_certificate, peer_identity
from meshnode.identity.ids import node_id_of
from meshnode.io.transport.addresses import join_address
from meshnode.wire import limits
from meshnode.wire.framing import FrameDecoder, encode_frame
from meshnode.wire.preface import StreamClass

FRAME_LIMITS = {
    StreamClass.CONTROL: limits.CONTROL_FRAME,
    StreamClass.REQUEST: limits.REQUEST_FRAME,
    StreamClass.ISSUER: limits.JOIN_FRAME,
    StreamClass.BULK: limits.BULK_FRAME,
}

_CLOSE_S = 1.0
"""A peer that does not read cannot hold up a close."""


class MeteredStream(trio.abc.HalfCloseableStream):
    """A socket stream that stops reading after `budget` bytes, until `lift` is called."""

    def __init__(self, socket_stream: trio.SocketStream, budget: int) -> None:
        self._stream = socket_stream
        self._budget: int | None = budget

    @property
    def remote(self) -> str:
        """`host:port` of the other end; empty when it is gone."""
        try:
            host, port = self._stream.socket.getpeername()[:2]
        except OSError:
            return ""
        return join_address(host, port)

    def lift(self) -> None:
        """The peer is known: no bound in all any more, frames are bounded one by one."""
        self._budget = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """As of `trio.SocketStream`; `PeerError` beyond the budget."""
        data = await self._stream.receive_some(max_bytes)
        if self._budget is not None:
            self._budget -= len(data)
            if self._budget < 0:
                raise PeerError("too many bytes before authentication")
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As of `trio.SocketStream`."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As of `trio.SocketStream`."""
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """As of `trio.SocketStream`."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """As of `trio.SocketStream`."""
        await self._stream.aclose()


class FramedStream:
    """Frames over a TLS stream whose handshake is done. One task receives at a time, any number send."""

    def __init__(self, tls: trio.SSLStream[MeteredStream], limit: int) -> None:
        self._tls = tls
        self._decoder = FrameDecoder(limit)
        self._sending = trio.Lock()

    @property
    def frame_limit(self) -> int:
        """The longest frame, in bytes, that either side may send."""
        return self._decoder.limit

    def peer_certificate(self) -> bytes | None:
        """The peer's leaf in DER."""
        return self._tls.getpeercert(binary_form=True)  # type: ignore[no-any-return]  # forwarded untyped by trio

    def peer_identity(self) -> PeerIdentity:
        """Who OpenSSL verified at the other end, with its issuer. `PeerError` for what is no node's certificate."""
        peer = peer_identity(parse_certificate(self.peer_certificate() or b""))
        # `SSLObject.get_verified_chain` is public from 3.13; what it calls has been there since 3.10.
        chain = self._tls._ssl_object._sslobj.get_verified_chain()  # type: ignore[attr-defined]
        issuer = key_bytes(parse_certificate(chain[1].public_bytes(ENCODING_DER)))
        return replace(peer, issuer=node_id_of(issuer))

    async def send_frame(self, payload: bytes) -> None:
        """Send one frame, whole. Cancelled in the middle, the stream is lost."""
        data = encode_frame(payload, self._decoder.limit)
        async with self._sending:
            await self._send(data)

    async def send_bytes(self, data: bytes | bytearray | memoryview) -> None:
        """Raw bytes, of a length that both sides know from a frame before."""
        view = memoryview(data)
        async with self._sending:
            for start in range(0, len(view), limits.BULK_WRITE):
                await self._send(view[start : start + limits.BULK_WRITE])

    async def receive_frame(self) -> bytes:
        """The next frame. Cancelled, nothing is lost."""
        while (frame := self._decoder.next_frame()) is None:
            self._decoder.feed(await self._receive())
        return frame

    async def receive_some(self, maximum: int) -> bytes:
        """1 to `maximum` raw bytes, as they come; follow `send_bytes` of the other side."""
        assert maximum > 0
        if not len(self._decoder):
            data = await self._receive()
            if len(data) <= maximum:
                return bytes(data)
            self._decoder.feed(data)
        return self._decoder.take(maximum)

    async def receive_bytes(self, count: int) -> bytes:
        """Exactly `count` raw bytes, at most `limits.BULK_FRAME` at once."""
        assert 0 <= count <= limits.BULK_FRAME
        while len(self._decoder) < count:
            self._decoder.feed(await self._receive())
        return self._decoder.take(count)

    async def aclose(self) -> None:
        """Close; never raises for what the peer did."""
        with trio.move_on_after(_CLOSE_S) as scope:
            scope.shield = True
            try:
                await self._tls.aclose()
            except (trio.BrokenResourceError, PeerError, OSError):
                pass
        await trio.aclose_forcefully(self._tls.transport_stream)

    async def _send(self, data: bytes | bytearray | memoryview) -> None:
        with broken_is_lost():
            await self._tls.send_all(data)

    async def _receive(self) -> bytes | bytearray:
        with broken_is_lost():
            data = await self._tls.receive_some(limits.BULK_READ)
        if not data:
            raise LinkLost("the peer closed the connection")
        return data


class Stream(FramedStream):
    """An authenticated MEMBER stream; `peer` was checked against its certificate."""

    def __init__(self, framed: FramedStream, peer: PeerIdentity, stream_class: StreamClass) -> None:
        """Take over `framed`, whose peer has just become known."""
        super().__init__(framed._tls, FRAME_LIMITS[stream_class])
        self._decoder.feed(framed._decoder.take(len(framed._decoder)))
        self._tls.transport_stream.lift()
        self.peer = peer
        self.remote = self._tls.transport_stream.remote
        self.stream_class = stream_class


class JoinStream(FramedStream):
    """A JOIN connection as the issuer sees it: nobody is known at the other end."""

    def __init__(self, framed: FramedStream, address: str, scope: trio.CancelScope) -> None:
        """Take over `framed`; `scope` ends the exchange."""
        super().__init__(framed._tls, framed.frame_limit)
        self.address = address
        """The host that the connection comes from."""
        self._scope = scope

    def prolong(self, seconds: float) -> None:
        """A person has to act: the exchange may take this much longer."""
        self._scope.deadline += seconds


@contextmanager
def broken_is_lost() -> Iterator[None]:
    """Translate what trio and OpenSSL raise: a refused certificate is the peer's doing, the rest is loss."""
    try:
        yield
    except (trio.BrokenResourceError, trio.ClosedResourceError) as broken:
        raise _explain(broken) from None


_OTHER_MESH = "it belongs to another mesh"
_CLOCKS = "compare the clocks of both machines"
_VERDICTS = {
    2: _OTHER_MESH,
    9: f"certificate is not valid yet; {_CLOCKS}",
    18: _OTHER_MESH,
    19: _OTHER_MESH,
    20: _OTHER_MESH,
}
"""Numbers of OpenSSL's x509_vfy.h whose own words a person could not act on."""
_ALERTS = {
    "UNKNOWN_CA": "unknown ca, so the peer belongs to another mesh",
    "BAD_CERTIFICATE": f"bad certificate, or one that is not valid yet there; {_CLOCKS}",
}
"""The same for what the other end says (RFC 8446, 6.2); it has no alert of its own for what is not valid yet."""


def _explain(broken: BaseException) -> PeerError | LinkLost:
    cause = broken.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        verdict = _VERDICTS.get(cause.verify_code, cause.verify_message)
        return PeerError(f"the peer's certificate is refused: {verdict}")
    if isinstance(cause, ssl.SSLError):
        reason = cause.reason or type(cause).__name__
        if "ALERT" in reason or "CERTIFICATE" in reason:
            alert = reason.partition("ALERT_")[2]
            told = _ALERTS.get(alert, (alert or reason).lower().replace("_", " "))
            return PeerError(f"the peer refuses this node's certificate: {told}")
        return LinkLost(f"TLS ended: {reason.lower().replace('_', ' ')}")
    return LinkLost(
        "the connection was closed" if isinstance(broken, trio.ClosedResourceError) else "the connection broke"
    )
