"""The command line against a node's admin routes, over real HTTP."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from meshnode.app.admin import InviteIssued, InviteRequest, RunningNode
from meshnode.app.cli.control import Control, running_node
from meshnode.errors import ConfigError, MeshError, Unavailable
from tests.app.cli.statuses import NODE

ISSUED = InviteIssued(invite="mesh1-line", id="i1", expires_at=datetime(2026, 1, 1, tzinfo=UTC))
TOKEN = "t0ken"


class Routes(BaseHTTPRequestHandler):
    """Answers as a node does."""

    def do_GET(self) -> None:
        if self.path == "/api/status":
            self.answer(200, msgspec.json.encode(NODE))
        elif self.path == "/api/invites":
            self.answer(200, b"not json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if self.path == "/api/invites":
            asked = msgspec.json.decode(body, type=InviteRequest)
            if asked.uses > 64:
                refusal = {"error": {"message": "too many uses", "type": "invalid_request_error", "hint": "at most 64"}}
                self.answer(400, msgspec.json.encode(refusal))
            else:
                self.answer(200, msgspec.json.encode(ISSUED))
        else:
            self.answer(503, b"<html>")

    def do_DELETE(self) -> None:
        self.answer(204, b"")

    def answer(self, code: int, body: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            code, body = 401, msgspec.json.encode({"error": {"message": "wrong token"}})
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Routes)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def describe(data: Path, node: RunningNode) -> None:
    (data / "node.json").write_bytes(msgspec.json.encode(node))
    (data / "api-token").write_text(TOKEN)


def test_the_node_of_a_data_directory_is_found_and_asked(tmp_path: Path, url: str) -> None:
    describe(tmp_path, RunningNode(pid=os.getpid(), mesh_port=1, api_port=int(url.rpartition(":")[2])))
    with Control.of(tmp_path) as control:
        assert control.status() == NODE
        assert control.invite(InviteRequest()) == ISSUED
        control.revoke_invite("i1")


def test_an_endpoint_that_is_not_on_loopback_is_asked_where_it_is(tmp_path: Path, url: str) -> None:
    describe(tmp_path, RunningNode(pid=os.getpid(), mesh_port=1, api_port=1, api_url=url))
    with Control.of(tmp_path) as control:
        assert control.status() == NODE


def test_no_node_or_a_killed_one_is_the_users_to_start(tmp_path: Path) -> None:
    assert running_node(tmp_path) is None
    # Above any process id that Linux gives by default.
    describe(tmp_path, RunningNode(pid=2**22 + 1, mesh_port=1, api_port=1))
    with pytest.raises(ConfigError, match="no node is running") as refused:
        Control.of(tmp_path)
    assert "meshnode serve" in refused.value.hint


def test_a_damaged_node_file_counts_as_no_node(tmp_path: Path) -> None:
    (tmp_path / "node.json").write_text("{")
    assert running_node(tmp_path) is None


def test_a_refusal_keeps_the_nodes_words_and_hint(url: str) -> None:
    with Control(url, TOKEN) as control, pytest.raises(ConfigError, match="too many uses") as refused:
        control.invite(InviteRequest(uses=65))
    assert refused.value.hint == "at most 64"


def test_a_wrong_token_is_told(url: str) -> None:
    with Control(url, "other") as control, pytest.raises(ConfigError, match="wrong token"):
        control.status()


def test_an_answer_that_is_none_is_an_error_not_a_traceback(url: str) -> None:
    with Control(url, TOKEN) as control:
        with pytest.raises(MeshError, match="not understood"):
            control.invites()
        with pytest.raises(Unavailable, match="503"):
            control.shutdown()


def test_nobody_listening_is_unavailable() -> None:
    with Control("http://127.0.0.1:9", TOKEN) as control, pytest.raises(Unavailable, match="does not answer"):
        control.status()
