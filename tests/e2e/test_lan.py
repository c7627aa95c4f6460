"""Joining without an invite: two real nodes, real mDNS on loopback, a terminal, and both people."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import nodes
from tests.e2e.nodes import WAIT_S, RealMesh, RealNode, run_cli, until

pytestmark = [pytest.mark.e2e, pytest.mark.native]
MEMORY = ("--memory", "1GB")


@pytest.fixture
def issuer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RealNode]:
    quiet = nodes.environment()
    monkeypatch.setattr(nodes, "environment", lambda: {**quiet, "MESHNODE_MDNS": "true"})
    mesh = RealMesh(tmp_path)
    try:
        yield mesh.found("issuer", *MEMORY)
    finally:
        mesh.close()


class Terminal:
    """`meshnode join` in a terminal, with somebody before it."""

    def __init__(self, data: Path, command: list[str], environment: dict[str, str]) -> None:
        self.data = data
        self._end, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self.shown = ""

    def shows(self, pattern: str) -> re.Match[str] | None:
        while select.select([self._end], [], [], 0)[0]:
            try:
                self.shown += os.read(self._end, 4096).decode(errors="replace")
            except OSError:  # Linux: the other end is closed
                break
        return re.search(pattern, self.shown)

    def awaited(self, pattern: str) -> re.Match[str]:
        found: re.Match[str] = until(f"{pattern!r} on the screen", lambda: self.shows(pattern))
        return found

    def type(self, words: str) -> None:
        os.write(self._end, f"{words}\n".encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)
        os.close(self._end)


@pytest.fixture
def terminal(issuer: RealNode, tmp_path: Path) -> Iterator[Terminal]:
    data = tmp_path / "kitchen"
    flags = ("--data", str(data), "--name", "kitchen", "--listen", "127.0.0.1", "--port", "0", "--api-port", "0")
    command = [sys.executable, "-m", "meshnode.app.cli", "join", *flags, *MEMORY]
    made = Terminal(data, command, nodes.environment())
    yield made
    made.close()


def choose(terminal: Terminal, issuer: RealNode) -> str:
    """Pick the issuer's mesh among those seen; the number shown."""
    mesh = issuer.status()["mesh"][:8]
    terminal.type(terminal.awaited(rf"(\d+)  mesh {mesh}")[1])
    return terminal.awaited(r"show (\d{3} \d{3})\? \[y/N\]")[1]


def test_two_people_compare_a_number_and_the_machine_is_a_member(issuer: RealNode, terminal: Terminal) -> None:
    number = choose(terminal, issuer)
    waiting = run_cli("pending", "--data", str(issuer.data))
    assert f"kitchen at 127.0.0.1 shows {number}?" in waiting.stdout
    assert not (terminal.data / "mesh.pem").exists()
    assert run_cli("approve", *number.split(), "--data", str(issuer.data)).returncode == 0
    terminal.type("y")
    until("both are linked", lambda: issuer.linked() == 1)


def test_a_no_leaves_no_membership_and_nobody_waiting(issuer: RealNode, terminal: Terminal) -> None:
    choose(terminal, issuer)
    terminal.type("n")
    assert terminal.process.wait(WAIT_S) == 2
    assert terminal.shows("the numbers differ")
    until("nobody waits", lambda: not issuer.api("GET", "/api/pending")["pending"])
    assert run_cli("approve", "123456", "--data", str(issuer.data)).returncode == 2
