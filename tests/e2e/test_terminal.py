"""A node in a real terminal that takes nothing more, as after Ctrl-S: the person's affair, not the mesh's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import msgspec
import pytest

from meshnode.app.admin import NODE_FILE, RunningNode
from meshnode.demo import MODEL
from tests.e2e.nodes import WAIT_S, environment, until

pty = pytest.importorskip("pty", reason="terminals are tested where systems have pseudo-terminals")
termios = pytest.importorskip("termios", reason="terminals are tested where systems have pseudo-terminals")

pytestmark = pytest.mark.e2e


def test_a_terminal_that_takes_nothing_stops_neither_answers_nor_leaving(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    flags = ["--data", str(tmp_path), "--listen", "127.0.0.1", "--port", "0", "--api-port", "0", "--threads", "1"]
    node = subprocess.Popen(
        [sys.executable, "-m", "meshnode.app.cli", "serve", str(MODEL), *flags],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(),
    )
    try:
        until("the node runs", (tmp_path / NODE_FILE).exists)
        api = msgspec.json.decode((tmp_path / NODE_FILE).read_bytes(), type=RunningNode).api_url
        termios.tcflow(theirs, termios.TCOOFF)
        until("the model is served", lambda: httpx.get(f"{api}/v1/models", timeout=WAIT_S).json()["data"])

        node.terminate()

        assert node.wait(WAIT_S) == 0
    finally:
        node.kill()
        node.wait()
        os.close(ours)
        os.close(theirs)
