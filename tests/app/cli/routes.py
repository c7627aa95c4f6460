"""A node's admin routes as a small HTTP server, for the command line's tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec

from meshnode.app.admin import InviteIssued, InviteRequest
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


@contextmanager
def serving() -> Iterator[str]:
    """The server's URL while it runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Routes)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()
