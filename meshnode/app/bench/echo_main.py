"""The other end of `meshnode bench link`: `python -m meshnode.app.bench.echo_main FD`.

Reads a member's identity (one line of JSON) from the socket FD, says its port there, and serves until it is killed:
CONTROL frames come back as they are, BULK bytes are counted and answered when all have come.
"""

from __future__ import annotations

import json
import socket
import sys
from typing import Final

import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from meshnode.errors import LinkLost, PeerError
from meshnode.identity.credentials import Credentials
from meshnode.io.transport.stream import Stream
from meshnode.io.transport.transport import Handlers, Transport
from meshnode.wire.artifacts import CHUNK_BYTES
from meshnode.wire.preface import StreamClass

ANSWER: Final = b"all of it"


def private_pem(credentials: Credentials) -> str:
    """The key of a member that lives as long as one measurement."""
    return credentials.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _credentials(line: bytes) -> Credentials:
    told = json.loads(line)
    key = load_pem_private_key(told["key"].encode(), None)
    assert isinstance(key, Ed25519PrivateKey)
    chain = tuple(x509.load_pem_x509_certificates(told["chain"].encode()))
    return Credentials(key, chain, x509.load_pem_x509_certificate(told["root"].encode()))


async def _answer(stream: Stream) -> None:
    try:
        while True:
            frame = await stream.receive_frame()
            if stream.stream_class is StreamClass.BULK:
                left = int(frame)
                while left:
                    left -= len(await stream.receive_some(min(left, CHUNK_BYTES)))
                frame = ANSWER
            await stream.send_frame(frame)
    except (LinkLost, PeerError):
        pass  # the measurement is over


async def _serve(connection: socket.socket, credentials: Credentials) -> None:
    async with trio.open_nursery() as nursery:
        port = await nursery.start(Transport(credentials).serve, "127.0.0.1", 0, Handlers(_answer))
        connection.sendall(str(port).encode())


def main() -> None:
    """Serve until the parent kills this process."""
    with socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rb") as lines:
        trio.run(_serve, connection, _credentials(lines.readline()))


if __name__ == "__main__":
    main()
