"""Artifacts over a BULK stream: the asking and the answering side.

Invariant: neither side holds more than one chunk; a peer that stops is given up after STALL_S.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from meshnode.errors import LinkLost, MeshError, PeerError
from meshnode.io.artifacts.library import Library
from meshnode.io.artifacts.shapes import ByteStream, Sink
from meshnode.wire.artifacts import (
    CHUNK_BYTES,
    MANIFEST_BYTES_MAX,
    Chunk,
    GetArtifact,
    GetManifest,
    Refused,
    Request,
    Sample,
    Sending,
    decode_reply,
    decode_request,
    encode,
)

STALL_S = 30.0
"""Without one chunk moving. A chunk takes 8 s at 1 Mbit/s; slower links serve no model."""

IDLE_S = 300.0
"""Between two requests of one stream: a joiner writes and verifies what it has before it asks for more."""


class BulkClient:
    """Asks one peer for artifacts, one request at a time. After any error but a refusal the stream is over."""

    remote = True

    def __init__(self, stream: ByteStream, label: str) -> None:
        """`label` names the peer in errors."""
        self._stream = stream
        self.label = label

    async def manifest(self, digest: str) -> bytes:
        """Canonical bytes of a manifest; the caller checks the digest. Errors: PeerError, LinkLost."""
        parts: list[bytes] = []

        async def keep(data: bytes) -> None:
            parts.append(data)

        size = await self._ask(GetManifest(digest))
        if size > MANIFEST_BYTES_MAX:
            raise PeerError(f"node {self.label} offers a manifest of {size} bytes")
        await self._receive(size, keep)
        return b"".join(parts)

    async def fetch(self, digest: str, artifact: str, offset: int, length: int, sink: Sink) -> None:
        """`length` bytes of `artifact` from `offset`, to `sink` in order. Errors: PeerError, LinkLost, the sink's."""
        size = await self._ask(GetArtifact(digest, artifact, offset, length))
        if size != length:
            raise PeerError(f"node {self.label} sends {size} bytes of {artifact}, {length} were asked for")
        await self._receive(length, sink)

    async def sample(self, length: int) -> None:
        """Receive `length` bytes (1 to SAMPLE_BYTES_MAX) that mean nothing. Errors: PeerError, LinkLost."""

        async def forget(data: bytes) -> None:
            pass

        if await self._ask(Sample(length)) != length:
            raise PeerError(f"node {self.label} answers a measurement of another length")
        await self._receive(length, forget)

    async def _ask(self, request: Request) -> int:
        with self._patience():
            await self._stream.send_frame(encode(request))
            reply = decode_reply(await self._stream.receive_frame())
        if isinstance(reply, Sending):
            return reply.size
        raise self._refusal(reply, request)

    async def _receive(self, size: int, sink: Sink) -> None:
        left = size
        while left:
            with self._patience():
                reply = decode_reply(await self._stream.receive_frame())
                if not isinstance(reply, Chunk):
                    raise self._refusal(reply, None)
                if reply.length > left:
                    raise PeerError(f"node {self.label} sends more bytes than it announced")
                data = await self._stream.receive_bytes(reply.length)
            await sink(data)
            left -= len(data)

    def _refusal(self, reply: Sending | Chunk | Refused, request: Request | None) -> PeerError:
        if not isinstance(reply, Refused):
            return PeerError(f"node {self.label} answered out of turn")
        what = request.artifact if isinstance(request, GetArtifact) else "the manifest" if request else "more"
        return PeerError(f"node {self.label} does not give {what}: {reply.reason}")

    def _patience(self) -> _Patience:
        return _Patience(self.label)


class _Patience:
    """Turns STALL_S without progress into LinkLost."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._scope = trio.move_on_after(STALL_S)

    def __enter__(self) -> None:
        self._scope.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._scope.__exit__(*exception)  # type: ignore[arg-type]  # passed on as they came
        if self._scope.cancelled_caught:
            raise LinkLost(f"node {self._label} sent nothing for {STALL_S:.0f} s")


async def serve_bulk(stream: ByteStream, library: Library) -> None:
    """Answer requests until the stream ends or is idle for IDLE_S. Errors: PeerError for bytes that are no request."""
    while True:
        with trio.move_on_after(IDLE_S) as idle:
            try:
                request = decode_request(await stream.receive_frame())
            except LinkLost:
                return
        if idle.cancelled_caught:
            return
        try:
            with trio.fail_after(STALL_S):
                answer = await _prepare(request, library)
            if isinstance(answer, Refused):
                await stream.send_frame(encode(answer))
            else:
                await _send(stream, *answer)
        except (LinkLost, trio.TooSlowError):
            return


async def _prepare(request: Request | Refused, library: Library) -> Refused | tuple[int, Callable[[int, int], bytes]]:
    """How many bytes to send, and where they come from: read(offset, length)."""
    if isinstance(request, Refused):
        return request
    if isinstance(request, GetManifest):
        manifest = await trio.to_thread.run_sync(library.manifest_bytes, request.digest)
        if manifest is None:
            return Refused("no_manifest")
        data = manifest
        return len(data), lambda offset, length: data[offset : offset + length]
    if isinstance(request, Sample):
        return request.length, lambda offset, length: bytes(length)
    found = await trio.to_thread.run_sync(library.find, request.digest, request.artifact)
    if found is None:
        return Refused("no_artifact")
    size, read = found
    base, length = request.offset, request.length
    if base + length > size:
        return Refused("bad_range")
    return length, lambda offset, count: read(base + offset, count)


async def _send(stream: ByteStream, size: int, read: Callable[[int, int], bytes]) -> None:
    with trio.fail_after(STALL_S):
        await stream.send_frame(encode(Sending(size)))
    for offset in range(0, size, CHUNK_BYTES):
        length = min(CHUNK_BYTES, size - offset)
        with trio.fail_after(STALL_S):
            try:
                data = await trio.to_thread.run_sync(read, offset, length)
            except (OSError, MeshError):
                await stream.send_frame(encode(Refused("unreadable")))
                return
            await stream.send_frame(encode(Chunk(len(data))))
            await stream.send_bytes(data)
