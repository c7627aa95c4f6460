"""TLS for the head's two streams: it dials stage 0 and accepts the last stage.

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


async def secure(
    connection: socket.socket, context: ssl.SSLContext, check: Callable[[bytes | None], None], *, server: bool
) -> trio.SSLStream[trio.SocketStream]:
    """TLS over `connection` (right behind its preface), the peer's certificate (DER) passed through `check`.

    The connection is closed when this fails. Raises PeerError (refused certificate) or StageLost.
    """
    connection.setblocking(False)
    stream = trio.SSLStream(
        trio.SocketStream(trio.socket.from_stdlib_socket(connection)),
        context,
        server_side=server,
        https_compatible=True,
    )
    try:
        with trio.fail_after(HANDSHAKE_S):
            await stream.do_handshake()
        check(stream.getpeercert(binary_form=True))
    except BaseException as error:
        await trio.aclose_forcefully(stream)
        if isinstance(error, trio.BrokenResourceError) and isinstance(error.__cause__, ssl.SSLError):
            raise PeerError("a stage's certificate is refused, or it refused ours") from None
        if isinstance(error, trio.BrokenResourceError | trio.TooSlowError | OSError):
            raise StageLost("a stage did not finish its handshake") from None
        raise
    return stream
