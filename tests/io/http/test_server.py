from __future__ import annotations

import logging
import socket

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from meshnode.errors import ConfigError
from meshnode.io.http import server
from meshnode.io.http.access import admin_route
from tests.io.http.byte_model import ByteDirectory, ByteModel
from tests.io.http.serving import serving

MIB = 2**20


def test_a_taken_port_is_one_clear_error() -> None:
    with server.listen("127.0.0.1", 0) as first, pytest.raises(ConfigError, match="in use") as failed:
        server.listen("127.0.0.1", first.getsockname()[1])
    assert "--api-port" in failed.value.hint


def test_ipv6_loopback_can_be_listened_on() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with server.listen("::1", 0) as listener:
        assert listener.getsockname()[1] > 0


async def answered(port: int, request: bytes) -> bytes:
    """What comes back for raw bytes until the server closes."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(request)
        received = b""
        while piece := await stream.receive_some(65536):
            received += piece
    return received


async def test_a_body_over_the_limit_is_413() -> None:
    async with serving(ByteDirectory(ByteModel())) as running, running.client() as client:
        response = await client.post(
            "/v1/completions", content=b"x" * (32 * MIB + 1), headers={"content-type": "application/json"}
        )
        again = await client.post("/v1/completions", json={"prompt": "hi"})
    assert (response.status_code, response.json()["error"]["type"]) == (413, "invalid_request_error")
    assert again.status_code == 200


async def test_a_body_over_the_limit_in_chunks_is_413() -> None:
    async def pieces():
        for _ in range(33):
            yield b" " * MIB

    async with serving(ByteDirectory(ByteModel())) as running, running.client() as client:
        headers = {"content-type": "application/json"}
        response = await client.post("/v1/completions", content=pieces(), headers=headers)
    assert response.status_code == 413


async def test_a_body_that_is_no_json_by_its_type_is_415() -> None:
    async with serving(ByteDirectory(ByteModel())) as running, running.client() as client:
        response = await client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert response.status_code == 415


async def test_a_body_that_stops_arriving_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshnode.io.http.body.PAUSE_S", 0.01)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{"
    async with serving(ByteDirectory(ByteModel())) as running:
        assert b" 408 " in (await answered(running.port, head)).split(b"\r\n")[0]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        b"\r\n" * 100 + b"nonsense\r\n\r\n",
        b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n\r\n",
    ],
    ids=["tls", "long head", "two lengths", "bad chunk", "http2", "nonsense", "web socket"],
)
async def test_what_is_no_http_request_ends_its_connection_only(request_bytes: bytes) -> None:
    async with serving(ByteDirectory(ByteModel())) as running, running.client() as client:
        received = await answered(running.port, request_bytes)
        assert not received or received.startswith(b"HTTP/1.1 4")
        assert (await client.get("/v1/models")).status_code == 200


async def test_an_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE_S", 0.01)
    async with serving(ByteDirectory(ByteModel())) as running:
        assert await answered(running.port, b"") == b""
        ended = await answered(running.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ended.startswith(b"HTTP/1.1 200")


async def test_connections_beyond_the_limit_are_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS", 1)
    async with serving(ByteDirectory(ByteModel())) as running, running.client() as client:
        await client.get("/health")
        assert await answered(running.port, b"") == b""


async def test_a_client_that_leaves_gives_its_connection_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not when the time of an idle one is over: most scripts open a connection for each request."""
    monkeypatch.setattr(server, "CONNECTIONS", 8)
    async with serving(ByteDirectory(ByteModel())) as running:
        for _ in range(40):
            async with running.client() as client:
                response = await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2})
                assert response.status_code == 200
            await wait_all_tasks_blocked()


async def test_our_own_bug_is_a_500_that_says_nothing_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(request):
        raise ZeroDivisionError("secret detail")

    routes = [admin_route("/api/broken", ["GET"], "t", broken)]
    with caplog.at_level(logging.ERROR, "meshnode.http"):
        async with serving(ByteDirectory(), routes) as running, running.client() as client:
            response = await client.get("/api/broken", headers={"authorization": "Bearer t"})
            assert (await client.get("/v1/models")).status_code == 200
    assert (response.status_code, response.headers["x-should-retry"]) == (500, "false")
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "ZeroDivisionError" in caplog.text


async def test_shutdown_closes_idle_connections_and_returns() -> None:
    async with serving(ByteDirectory(ByteModel())) as running, running.client() as client:
        await client.get("/health")
        idle = await trio.open_tcp_stream("127.0.0.1", running.port)
        running.shutdown.set()
        await running.ended.wait()
        async with idle:
            assert await idle.receive_some(1) == b""
        with pytest.raises(OSError, match="attempts to connect"):
            await trio.open_tcp_stream("127.0.0.1", running.port)
