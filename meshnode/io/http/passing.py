"""Requests for models that another node serves: out over the directory, in through an app in this process.

Invariant: a request is passed on once at most, and only what is asked of one model is reached that way.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import trio
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meshnode.errors import LinkLost, MeshError, PeerError, Unavailable
from meshnode.io.http.answer import Draining, EndOfStream, EventStream, cancel_on_disconnect
from meshnode.io.http.backend import Directory, PassedAnswer, PassedRequest
from meshnode.io.http.failure import Dialect, dialect_of, failure_of
from meshnode.io.http.owners import OWNER_HEADER, owned

ANSWER_HEADERS: Final = frozenset(
    {
        *("content-type", "content-length", "cache-control", "retry-after"),
        *("x-should-retry", "x-accel-buffering", "x-meshnode-schema"),
    }
)
"""What of the other node's answer goes to the client; the rest belongs to the connection."""
CHUNKS: Final = 16
"""Pieces of an answer on their way to the other node; then its generation waits."""

_MARK: Final = "meshnode.passed_on"
_LOG = logging.getLogger("meshnode.http")


def was_passed_on(scope: Scope) -> bool:
    """True for a request that came from another node."""
    return _MARK in scope.get("extensions", {})


class PassedOn(Response):
    """An answer that another node writes."""

    def __init__(self, directory: Directory, model_id: str, request: PassedRequest, draining: Draining) -> None:
        super().__init__()
        self._directory = directory
        self._model_id = model_id
        self._request = request
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI response."""
        with self._draining.answering():
            ending = await self._run(receive, send)
            if ending is not None:
                await ending(scope, receive, send)

    async def _run(self, receive: Receive, send: Send) -> Response | None:
        """Copy the answer; what is left to send after it, None when the client left."""
        sent = _Sent(send, dialect_of(self._request.path))
        ending: Response | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel_on_disconnect, receive, nursery.cancel_scope.cancel)
            nursery.start_soon(self._cancel_when_draining, drained := trio.CancelScope())
            failed: MeshError | None = None
            with drained:
                try:
                    async with self._directory.pass_on(self._model_id, self._request) as answer:
                        await sent.copy(answer)
                except (LinkLost, PeerError) as error:
                    # Addresses and TLS belong in the log; the client can only try again.
                    _LOG.warning("a request could not be passed on: %s", error)
                    failed = Unavailable("the node that serves this model was lost; try again")
                except MeshError as error:
                    failed = error
            if drained.cancelled_caught:
                failed = Unavailable("this node is shutting down")
            ending = EndOfStream() if failed is None else await sent.fail(failed)
            nursery.cancel_scope.cancel()
        return ending

    async def _cancel_when_draining(self, scope: trio.CancelScope) -> None:
        await self._draining.wait()
        scope.cancel()


class _Sent:
    """What of the answer the client has."""

    def __init__(self, send: Send, dialect: Dialect) -> None:
        self._send = send
        self._dialect = dialect
        self._started = False
        self._streams = False

    async def copy(self, answer: PassedAnswer) -> None:
        headers = [(name, value) for name, value in answer.headers if name in ANSWER_HEADERS]
        self._streams = any(name == "content-type" and value.startswith("text/event-stream") for name, value in headers)
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        self._started = True
        await self._send({"type": "http.response.start", "status": answer.status, "headers": raw})
        chunks = answer.chunks
        try:
            async for chunk in chunks:
                await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            # A generator that is only dropped would be closed by the garbage collector, at any time.
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()

    async def fail(self, error: MeshError) -> Response | None:
        """The best ending that is still possible: a status, an error event, or a connection that breaks off."""
        if not self._started:
            return failure_of(error).response(self._dialect)
        if not self._streams:
            return None
        await EventStream(self._send).data(failure_of(error).event(self._dialect))
        return EndOfStream()


class _LocalAnswer:
    """PassedAnswer of an app in this process."""

    def __init__(self, start: Message, chunks: AsyncIterator[bytes]) -> None:
        self.status: int = start["status"]
        self.headers = tuple(
            (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in start.get("headers", [])
        )
        self.chunks = chunks


@asynccontextmanager
async def answer_here(app: ASGIApp, request: PassedRequest) -> AsyncIterator[PassedAnswer]:
    """Serve a request that another node passed on. Leaving the context is the client's disconnect.

    `app` is `HttpEndpoint.passed`; it writes its own errors, so nothing but our own bugs is raised here.
    """
    into, pieces = trio.open_memory_channel[Message](CHUNKS)
    body_sent = False

    async def receive() -> Message:
        nonlocal body_sent
        if body_sent:
            await trio.sleep_forever()
        body_sent = True
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def run() -> None:
        async with into:
            await app(_scope(request), receive, into.send)

    # A nursery would wrap what the caller's block raises; the caller expects it as it was.
    failed: MeshError | None = None
    async with trio.open_nursery() as nursery, pieces:
        nursery.start_soon(run)
        try:
            yield _LocalAnswer(await pieces.receive(), _Bodies(pieces))
        except MeshError as error:
            failed = error
        finally:
            nursery.cancel_scope.cancel()
    if failed is not None:
        raise failed


class _Bodies:
    """The body pieces among the messages. No generator: nobody has to close it."""

    def __init__(self, messages: trio.MemoryReceiveChannel[Message]) -> None:
        self._messages = messages
        self._ended = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._ended:
            message = await self._messages.receive()
            self._ended = not message.get("more_body", False)
            if message.get("body"):
                body: bytes = message["body"]
                return body
        raise StopAsyncIteration


def _scope(request: PassedRequest) -> dict[str, Any]:
    path, _, query = request.path.partition("?")
    # Under a name that no key of this node has: two nodes do not know each other's.
    owner = next((f"passed-{value}" for name, value in request.headers if name.lower() == OWNER_HEADER), "")
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8"),
        "query_string": query.encode("utf-8"),
        "root_path": "",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in request.headers],
        "client": None,
        "server": None,
        "extensions": {_MARK: {}},
        "state": {},
    }
    return dict(owned(scope, owner))
