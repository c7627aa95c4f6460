"""HTTP clients that mean no good, or are broken, at the endpoint of a real node; and starts that are interrupted."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from meshnode.demo import MODEL
from tests.e2e.harm import unharmed
from tests.e2e.nodes import WAIT_S, RealMesh, RealNode, until

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "A"}]
LEAVES_S = 5.0
"""What REQUIREMENTS promise for leaving; a child outlives its node by less."""


@pytest.fixture(autouse=True)
def _unharmed(mesh: RealMesh) -> Iterator[None]:
    with unharmed(mesh):
        yield


@pytest.fixture(params=[0, 1], ids=["the head's node", "another node"])
def node(mesh: RealMesh, request: pytest.FixtureRequest) -> RealNode:
    return mesh.nodes[request.param]


def raw(node: RealNode, words: bytes) -> socket.socket:
    """A connection to the endpoint that has said `words`."""
    assert node.running is not None
    made = socket.create_connection(("127.0.0.1", node.running["api_port"]), timeout=WAIT_S)
    made.sendall(words)
    return made


def said(body: bytes, *headers: str, path: str = CHAT) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def status_of(connection: socket.socket) -> int:
    """Of the answer; 0 when the node only closed."""
    with connection:
        line = connection.recv(4096).split(b"\r\n")[0].split()
    return int(line[1]) if line else 0


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": MESSAGES, **fields}).encode()


def test_bytes_that_are_no_request_end_their_connection_only(node: RealNode) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode()
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    for words, wanted in (
        (os.urandom(4096) + b"\r\n\r\n", {0, 400}),
        (b"\x16\x03\x01" + bytes(99) + b"\r\n\r\n", {0, 400}),
        (head + b"X: " + b"x" * 70_000, {0, 400, 431}),
        (head + b"".join(b"X%d: y\r\n" % n for n in range(9999)), {0, 400, 431}),
        (head + b"Content-Length: -1\r\n\r\n", {0, 400}),
        (head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", {0, 400}),
        (head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", {0, 400}),
        (chunked + b"zz\r\n", {0, 400}),
        (chunked + b"ffffffffffffffffffffffff\r\n", {0, 400}),
        (chunked + b"5\r\nhello\r\n0\r\n\r\n", {400}),
        (said(b"{}", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x"), {400}),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n", {200}),
        (b"GET /v1/models HTTP/1.1\r\n\r\n", {0, 400}),
        (b"GET /v1/models HTTP/1.0\r\n\r\n", {403}),
        (b"GET /v1/models/../../api/status HTTP/1.1\r\nHost: localhost\r\n\r\n", {404}),
        (b"GET /%ff%00%2e%2e HTTP/1.1\r\nHost: localhost\r\n\r\n", {404}),
        (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", {0, 400}),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {0, 400, 403}),
    ):
        try:
            assert status_of(raw(node, words)) in wanted, words[:80]
        except ConnectionError:
            assert 0 in wanted, words[:80]


def test_bodies_that_mean_nothing_are_400_and_large_ones_413(node: RealNode) -> None:
    deep = b"[" * 100_000
    nested: Any = "x"
    for _ in range(700):
        nested = [nested]
    for body, wanted in (
        (b"", 400),
        (b"\xff\xfe", 400),
        (b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}', 400),
        (deep, 400),
        (b'{"messages":' + deep, 400),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400),
        (chat(chat_template_kwargs={"x": nested}), 200),
        (b'{"messages":[{"role":"user","content":"\\ud800"}]}', 400),
        (b'{"messages":[{"role":"user","content":"A\\u0000B"}],"max_tokens":1}', 200),
        (b"1" * 10_000, 400),
        (b'{"model":"' + b"x" * 10_000 + b'"}', 404),
        (b" " * (33 * 2**20), 413),
    ):
        assert status_of(raw(node, said(body))) == wanted, body[:80]


@pytest.mark.parametrize(
    ("wanted", "fields"),
    [
        (400, {"n": 1000}),
        (400, {"n": 0}),
        (400, {"n": -1}),
        (400, {"max_tokens": -2}),
        (400, {"max_tokens": 0}),
        (400, {"max_tokens": 1.5}),
        (200, {"max_tokens": 2, "seed": -(2**63)}),
        (400, {"temperature": -1}),
        (400, {"temperature": 1e30}),
        (400, {"temperature": "hot"}),
        (400, {"top_p": 2}),
        (400, {"stop": ["x"] * 1000}),
        (400, {"stop": ["x" * 100_000]}),
        (400, {"logit_bias": {"-1": 1}}),
        (400, {"logit_bias": {str(2**31): 1}}),
        (200, {"logit_bias": {"1": 1e30}}),
        (400, {"logit_bias": {str(token): 1 for token in range(100_000)}}),
        (400, {"logit_bias": {"x": 1}}),
        (400, {"top_logprobs": 1000, "logprobs": True}),
        (400, {"repeat_last_n": 2**31}),
        (400, {"messages": []}),
        (400, {"messages": [{"role": "user", "content": "A"}] * 5000}),
        (400, {"messages": [{"role": "user", "content": "A " * 50_000}]}),
    ],
)
def test_extreme_values_are_400_or_have_a_meaning(mesh: RealMesh, wanted: int, fields: dict[str, Any]) -> None:
    for node in mesh.nodes[:2]:
        response = httpx.post(f"{node.url}{CHAT}", json={"messages": MESSAGES, "max_tokens": 2, **fields}, timeout=60)
        assert response.status_code == wanted, response.text


def test_numbers_that_json_does_not_have_are_400(node: RealNode) -> None:
    for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"0x10", b"01"):
        body = b'{"messages":[{"role":"user","content":"A"}],"temperature":' + number + b"}"
        assert status_of(raw(node, said(body))) == 400


def test_pages_of_other_sites_and_callers_without_the_token_are_refused(node: RealNode) -> None:
    token = (node.data / "api-token").read_text().strip()
    authorized = {"authorization": f"Bearer {token}"}
    for headers, path, wanted in (
        ({"host": "evil.example"}, "/v1/models", 403),
        ({"host": "127.0.0.1.evil.example"}, "/v1/models", 403),
        ({"host": ""}, "/v1/models", 403),
        ({"origin": "https://evil.example"}, "/v1/models", 403),
        ({"origin": "null"}, "/v1/models", 403),
        ({"host": "evil.example", **authorized}, "/api/status", 403),
        ({}, "/api/status", 401),
        ({"authorization": "Bearer"}, "/api/status", 401),
        ({"authorization": f"Bearer {token[:-1]}"}, "/api/status", 401),
        ({"authorization": f"Basic {token}"}, "/api/status", 401),
        ({"authorization": "Bearer \xff".encode("latin-1")}, "/api/status", 401),
        (authorized, "/api/status", 200),
    ):
        assert httpx.get(f"{node.url}{path}", headers=headers).status_code == wanted, (headers, path)
    for method, path in (("POST", "/api/shutdown"), ("POST", "/api/invites"), ("DELETE", "/api/invites/00")):
        assert httpx.request(method, f"{node.url}{path}", content=b"{}").status_code == 401
    for body in (
        b'{"uses":-1}',
        b'{"uses":1e9}',
        b'{"expires_s":1e300}',
        b'{"role":"root"}',
        b"[]",
        b'{"expires_s":-5}',
    ):
        assert httpx.post(f"{node.url}/api/invites", content=body, headers=authorized).status_code == 400
    assert httpx.delete(f"{node.url}/api/invites/zz", headers=authorized).status_code == 400


def test_clients_that_leave_at_any_moment_leave_no_lane_behind(node: RealNode) -> None:
    draw = random.Random(node.name)
    whole = said(chat(stream=True, max_tokens=500, ignore_eos=True))
    for _ in range(100):
        connection = raw(node, whole[: draw.randrange(1, len(whole))] if draw.random() < 0.3 else whole)
        connection.settimeout(draw.random() * 0.05)
        try:
            while connection.recv(4096) and draw.random() < 0.8:
                pass
        except TimeoutError:
            pass
        if draw.random() < 0.5:  # a reset instead of an end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.close()
    until("no lane is busy", lambda: httpx.get(f"{node.url}/health").json().get("lanes_busy", 0) == 0)


def test_slow_and_deaf_clients_keep_nobody_else_waiting(mesh: RealMesh, node: RealNode) -> None:
    slow = [raw(node, b"POST / HTTP/1.1\r\nX: ") for _ in range(100)]
    half = [raw(node, said(chat())[:-5]) for _ in range(50)]
    deaf = [raw(node, said(chat(stream=True, max_tokens=1500, ignore_eos=True))) for _ in range(2)]
    eager = [raw(node, said(chat(max_tokens=1)) * 50) for _ in range(2)]
    assert status_of(raw(node, said(chat(max_tokens=3)))) == 200
    for connection in (*slow, *half, *deaf, *eager):
        connection.close()


# --- processes ----------------------------------------------------------------------------------------------------


def test_more_requests_than_lanes_are_all_answered_or_told_to_wait(node: RealNode) -> None:
    opened = [raw(node, said(chat(max_tokens=20))) for _ in range(60)]
    found = [status_of(each) for each in opened]
    assert set(found) <= {200, 429, 503}
    assert found.count(200) >= 4


class TestOfProcesses:
    """Kills and interrupts: of nodes that are no part of the mesh above."""

    @pytest.fixture
    def alone(self, tmp_path: Path) -> Iterator[RealMesh]:
        mesh = RealMesh(tmp_path)
        yield mesh
        mesh.close()

    def test_children_of_a_killed_node_end_by_themselves(self, alone: RealMesh) -> None:
        node = alone.found("killed", "--memory", "1GB")
        until("it serves", node.serving)
        assert node.process is not None
        children = psutil.Process(node.process.pid).children(recursive=True)
        assert len(children) >= 2, "a stage and a tokenizer"
        node.process.kill()
        _, alive = psutil.wait_procs(children, timeout=LEAVES_S)
        assert not alive

    def test_a_node_whose_forwarded_port_leads_elsewhere_serves_itself_and_a_joiner_can_give_up(
        self, alone: RealMesh
    ) -> None:
        """The issuer of the invite takes the connection and says nothing."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            founder = alone.found("founder", "--memory", "1GB", "--advertise", f"127.0.0.1:{silent.getsockname()[1]}")
            joiner = RealNode(alone.folder, "joiner")
            alone.nodes.append(joiner)
            joiner.start("join", founder.invite())
            silent.settimeout(WAIT_S)
            with silent.accept()[0] as asked:
                assert asked.recv(4), "it waits for the welcome"
                began = time.monotonic()
                assert joiner.stop(signal.SIGINT) in (130, 1)
                assert time.monotonic() - began < 2 * LEAVES_S
        assert not (joiner.data / "mesh.pem").exists()
        until("it serves", founder.serving)

    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("moment", ["locked", "answering", "tokenizer", "stage"])
    def test_a_start_can_be_interrupted_at_any_moment(self, alone: RealMesh, moment: str, how: signal.Signals) -> None:
        node = RealNode(alone.folder, "stopped")
        alone.nodes.append(node)
        node.start("serve", str(MODEL), "--memory", "1GB")
        assert node.process is not None
        process = psutil.Process(node.process.pid)
        reached = {
            "locked": (node.data / "lock").exists,
            "answering": (node.data / "node.json").exists,
            "tokenizer": lambda: len(process.children()) == 1,
            "stage": lambda: len(process.children()) == 2,
        }
        until(f"{moment} was reached", reached[moment])
        children = process.children(recursive=True)
        began = time.monotonic()
        code = node.stop(how)
        assert time.monotonic() - began < 2 * LEAVES_S, "twice the promise: this machine may be busy"
        assert code in ({130, -signal.SIGINT} if how == signal.SIGINT else {0}), node.words()
        assert "Traceback" not in node.words()
        _, alive = psutil.wait_procs(children, timeout=LEAVES_S)
        assert not alive
        assert not (node.data / "node.json").exists()
