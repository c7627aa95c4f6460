"""TLS for the head's two streams: it dials stage 0 and accepts the last stage.

Every token passes here twice, on a processor whose caches hold weights, so the path is short: OpenSSL reads and writes
the socket itself, and the event loop is asked only when there is nothing to read. (trio.SSLStream takes four turns of
the loop for a token, 200 us more.)

The contexts come from outside (`io.transport.tls.stage_context`), and so does the check of the peer's name: OpenSSL
verifies the chain, the name is a rule of ours.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from typing import Final

import trio

from meshnode.errors import PeerError, StageLost

HANDSHAKE_S: Final = 5.0
"""As everywhere before authentication (NETWORK)."""

_READS_IN_A_ROW: Final = 16
"""Reads without waiting before other tasks get a turn."""


class HeadStream:
    """A TLS connection in non-blocking mode; one task reads, one writes. What ends it is StageLost."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        self._socket = connection
        self._reads = 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything. Yields to other tasks only while the socket is full."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self._socket)
            except OSError as error:
                raise StageLost(f"the connection to a stage broke: {type(error).__name__}") from None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What is there, or the next that comes; nothing at the end."""
        self._reads += 1
        if self._reads >= _READS_IN_A_ROW:
            self._reads = 0
            await trio.lowlevel.checkpoint()
        while True:
            try:
                return self._socket.recv(max_bytes or 65536)
            except ssl.SSLWantReadError:
                self._reads = 0
                await trio.lowlevel.wait_readable(self._socket)
            except OSError as error:
                raise StageLost(f"the connection to a stage broke: {type(error).__name__}") from None

    async def aclose(self) -> None:
        """Close; the other end sees the end of the connection. Twice is fine."""
        if self._socket.fileno() < 0:
            return
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()


async def secure(
    connection: socket.socket, context: ssl.SSLContext, check: Callable[[bytes | None], None], *, server: bool
) -> HeadStream:
    """TLS over `connection` (right behind its preface), the peer's certificate (DER) passed through `check`.

    The connection is taken over, and closed when this fails. Raises PeerError (refused certificate) or StageLost.
    """
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream = context.wrap_socket(
        connection, server_side=server, do_handshake_on_connect=False, suppress_ragged_eofs=True
    )
    try:
        with trio.fail_after(HANDSHAKE_S):
            await _handshake(stream)
        check(stream.getpeercert(binary_form=True))
    except (trio.TooSlowError, ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError):
        stream.close()
        raise StageLost("a stage did not finish its handshake") from None
    except ssl.SSLError as error:
        stream.close()
        raise PeerError(f"a stage's certificate is refused, or it refused ours: {error.reason}") from None
    except BaseException:
        stream.close()
        raise
    return HeadStream(stream)


async def _handshake(stream: ssl.SSLSocket) -> None:
    while True:
        try:
            stream.do_handshake()
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(stream)
        except ssl.SSLWantWriteError:
            await trio.lowlevel.wait_writable(stream)
        else:
            return
