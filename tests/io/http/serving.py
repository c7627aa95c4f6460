"""A real endpoint on loopback per test."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import trio

from meshnode.io.http.access import Access
from meshnode.io.http.endpoint import build_endpoint
from meshnode.io.http.metrics import no_figures
from meshnode.io.http.server import listen, serve_http
from tests.io.http.byte_model import ByteDirectory


class Serving:
    """One running endpoint."""

    def __init__(self, port: int, shutdown: trio.Event, ended: trio.Event) -> None:
        self.port = port
        self.shutdown = shutdown
        self.ended = ended
        self.url = f"http://127.0.0.1:{port}"

    def client(self, **options) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=20, trust_env=False, **options)


@asynccontextmanager
async def serving(
    directory: ByteDirectory, admin_routes=(), access: Access | None = None, figures=no_figures
) -> AsyncIterator[Serving]:
    """Serves `directory` on a free port until the block ends."""
    endpoint = build_endpoint(directory, admin_routes, access, figures)
    shutdown, ended = trio.Event(), trio.Event()

    async def run(task_status=trio.TASK_STATUS_IGNORED) -> None:
        await serve_http(endpoint, listen("127.0.0.1", 0), shutdown, task_status)
        ended.set()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            port = await nursery.start(run)
            yield Serving(port, shutdown, ended)
            shutdown.set()


def events(text: str) -> list[dict | str]:
    """The events of a stream: data decoded, `[DONE]` and comments as they are."""
    found = []
    for event in text.split("\n\n"):
        if event.startswith("data: {"):
            found.append(json.loads(event.removeprefix("data: ")))
        elif event:
            found.append(event.removeprefix("data: "))
    return found


async def raw_request(port: int, body: dict, path: str = "/v1/chat/completions") -> trio.SocketStream:
    """A request on a bare socket, sent and not answered yet."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    )
    await stream.send_all(head.encode() + b"\r\n" + data)
    return stream
