"""API requests between nodes, over a REQUEST stream: one request each, the answer in pieces, closing cancels.

    -> Asked, then the body in frames of at most FRAME bytes
    <- Answering (status, headers), then frames: the body in pieces; an empty frame ends it

Invariant: a stream carries one request, and a side that goes away is noticed by the other on its next read or write.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Final, TypeVar

import msgspec
import trio
from starlette.types import ASGIApp

from meshnode.errors import LinkLost, MeshError, PeerError
from meshnode.io.http.backend import PassedAnswer, PassedRequest
from meshnode.io.http.passing import answer_here
from meshnode.io.transport.stream import Stream
from meshnode.wire.limits import REQUEST_BODY, REQUEST_FRAME

PIECE: Final = REQUEST_FRAME // 2
"""Of a body; the rest of a frame is room for growth."""
ANSWER_S: Final = 900.0
"""Until the answer begins: a non-streamed answer begins when it is complete."""
ASKED_S: Final = 60.0
"""For a whole request, on both sides: 32 MiB at 5 Mbit/s, the slowest Wi-Fi; a peer that stalls must not keep its
stream."""
PIECE_S: Final = 60.0
"""Between two pieces of an answer that has begun: a stream pings every 10 s, and any other is complete by then. A
frozen process keeps its connections alive and says nothing."""
HEADER_CHARACTERS: Final = 4096
"""Of one header or path: half of what HTTP servers take for a whole line."""
HEADERS: Final = 32
"""Of a request or answer: three and six are passed on."""

_T = TypeVar("_T")


Printable = Annotated[str, msgspec.Meta(pattern=r"^[ -~]*\Z", max_length=HEADER_CHARACTERS)]
"""ASCII without control characters: what HTTP can carry as it is."""
Headers = Annotated[tuple[tuple[Printable, Printable], ...], msgspec.Meta(max_length=HEADERS)]


class Asked(msgspec.Struct, frozen=True):
    """An API request without its body."""

    method: Printable
    path: Printable
    headers: Headers
    body_bytes: Annotated[int, msgspec.Meta(ge=0, le=REQUEST_BODY)]


class Answering(msgspec.Struct, frozen=True):
    """The beginning of an answer."""

    status: Annotated[int, msgspec.Meta(ge=200, le=599)]
    headers: Headers


class StreamedAnswer:
    """io.http.backend.PassedAnswer over a stream."""

    def __init__(self, begun: Answering, chunks: AsyncIterator[bytes]) -> None:
        self.status = begun.status
        self.headers = begun.headers
        self.chunks = chunks


@asynccontextmanager
async def ask(stream: Stream, request: PassedRequest) -> AsyncIterator[StreamedAnswer]:
    """Send `request`; leaving the context ends it over there. LinkLost or PeerError when the other node fails."""
    try:
        headers = tuple(pair for pair in request.headers if all(map(_is_plain, pair)))
        asked = Asked(request.method, request.path, headers, len(request.body))
        taken = False
        with trio.move_on_after(ASKED_S):
            await stream.send_frame(msgspec.msgpack.encode(asked))
            for at in range(0, len(request.body), PIECE):
                await stream.send_frame(request.body[at : at + PIECE])
            taken = True
        if not taken:
            raise LinkLost("the node that serves this model did not take the request in time")
        begun: Answering | None = None
        with trio.move_on_after(ANSWER_S):
            begun = _decode(await stream.receive_frame(), Answering)
        if begun is None:
            raise LinkLost("the node that serves this model did not answer in time")
        yield StreamedAnswer(begun, _pieces(stream))
    finally:
        await stream.aclose()


async def answer(stream: Stream, app: ASGIApp, more: Callable[[], Headers] = tuple) -> None:
    """Serve the one request of `stream` on `app`; `more` gives headers for the asking node.

    Raises LinkLost (the asker is gone) or PeerError (it lies).
    """
    request: PassedRequest | None = None
    with trio.move_on_after(ASKED_S):
        request = await _receive(stream)
    if request is None:
        raise PeerError("a passed request that did not come to its end")
    failed: MeshError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_when_gone, stream, nursery.cancel_scope)
        try:
            async with answer_here(app, request) as answered:
                await _send(stream, answered, more())
        except MeshError as error:
            failed = error  # the nursery would wrap it, and the transport looks for what it is
        nursery.cancel_scope.cancel()
    if failed is not None:
        raise failed


async def _receive(stream: Stream) -> PassedRequest:
    asked = _decode(await stream.receive_frame(), Asked)
    body = bytearray()
    while len(body) < asked.body_bytes:
        piece = await stream.receive_frame()
        if not piece or len(body) + len(piece) > asked.body_bytes:
            raise PeerError("a passed request with another body than announced")
        body += piece
    return PassedRequest(asked.method, asked.path, asked.headers, bytes(body))


async def _send(stream: Stream, answered: PassedAnswer, more: Headers) -> None:
    headers = (*answered.headers, *(pair for pair in more if all(map(_is_plain, pair))))
    await stream.send_frame(msgspec.msgpack.encode(Answering(answered.status, headers)))
    async for chunk in answered.chunks:
        for at in range(0, len(chunk), PIECE):
            await stream.send_frame(chunk[at : at + PIECE])
    await stream.send_frame(b"")


def _is_plain(text: str) -> bool:
    """A client may write anything into a header; what the other node would refuse is left out."""
    return text.isascii() and text.isprintable() and len(text) <= HEADER_CHARACTERS


async def _cancel_when_gone(stream: Stream, scope: trio.CancelScope) -> None:
    """The asking node sends nothing more: whatever a read brings is its end."""
    try:
        await stream.receive_frame()
    except MeshError:
        pass
    scope.cancel()


async def _pieces(stream: Stream) -> AsyncIterator[bytes]:
    while True:
        piece: bytes | None = None
        with trio.move_on_after(PIECE_S):
            piece = await stream.receive_frame()
        if piece is None:
            raise LinkLost("the node that serves this model fell silent in the middle of an answer")
        if not piece:
            return
        yield piece


def _decode(frame: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.msgpack.decode(frame, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PeerError(f"malformed {kind.__name__}: {type(error).__name__}") from None
