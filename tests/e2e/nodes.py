"""Real nodes as processes of the command line, each with a data directory of its own, on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai

from meshnode.demo import MODEL

WAIT_S = 60.0
"""Far above what anything takes here (seconds), so that a loaded machine fails no test; a hang still ends."""


def environment() -> dict[str, str]:
    """The caller's, without settings of a node and without a terminal's width."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MESHNODE_")}
    return {**kept, "COLUMNS": "200", "NO_COLOR": "1", "MESHNODE_MDNS": "false", "MESHNODE_MEASURE": "false"}


def run_cli(*arguments: str, timeout: float = WAIT_S) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    command = [sys.executable, "-m", "meshnode.app.cli", *arguments]
    return subprocess.run(
        command,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def until(what: str, look: Callable[[], Any], timeout: float = WAIT_S) -> Any:
    """The first true value of `look`; AssertionError after `timeout`."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        value = look()
        if value:
            return value
        give_way(0.05)
    raise AssertionError(f"never happened within {timeout:g} s: {what}")


def give_way(seconds: float) -> None:
    """Yield the processor to the processes under test; what is awaited is a condition, never this time."""
    threading.Event().wait(seconds)


class RealNode:
    """One node process."""

    def __init__(self, folder: Path, name: str) -> None:
        self.data = folder / name
        self.name = name
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._clients: list[openai.OpenAI] = []

    def start(self, *arguments: str) -> None:
        """`meshnode <arguments>` on free ports of loopback."""
        flags = ("--data", str(self.data), "--name", self.name, "--listen", "127.0.0.1", "--port", "0")
        command = [sys.executable, "-m", "meshnode.app.cli", *arguments, *flags, "--api-port", "0", "--threads", "1"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def words(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace")

    @property
    def running(self) -> dict[str, Any] | None:
        """Its node.json, once it answers."""
        assert self.process is not None
        assert self.process.poll() is None, f"{self.name} ended:\n{self.words()}"
        try:
            return json.loads((self.data / "node.json").read_text())
        except (OSError, ValueError):
            return None

    def await_running(self) -> None:
        until(f"{self.name} answers", lambda: self.running)

    @property
    def url(self) -> str:
        """Base URL of its endpoint."""
        found = until(f"{self.name} answers", lambda: self.running)
        return found["api_url"]

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """A call of /api with the node's token."""
        token = (self.data / "api-token").read_text().strip()
        headers = {"authorization": f"Bearer {token}"}
        response = httpx.request(method, f"{self.url}{path}", json=body, headers=headers, timeout=WAIT_S)
        assert response.status_code < 300, response.text
        return response.json() if response.content else None

    def status(self) -> dict[str, Any]:
        return self.api("GET", "/api/status")

    def invite(self, **options: Any) -> str:
        return self.api("POST", "/api/invites", options)["invite"]

    def deployment(self) -> dict[str, Any] | None:
        return next(iter(self.status()["deployments"]), None)

    def serving(self) -> dict[str, Any] | None:
        found = self.deployment()
        return found if found is not None and found["state"] == "serving" else None

    def ready(self) -> bool:
        """Its endpoint has a model that answers."""
        return httpx.get(f"{self.url}/health", timeout=WAIT_S).status_code == 200

    def linked(self) -> int:
        return sum(peer["state"] == "linked" for peer in self.status()["peers"])

    def client(self) -> openai.OpenAI:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=WAIT_S)
        self._clients.append(client)
        return client

    def close_clients(self) -> None:
        """Their sockets; a test's warnings are errors."""
        for client in self._clients:
            client.close()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to leave (or kill it); its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(WAIT_S)


class RealMesh:
    """Nodes that joined by real invites."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: list[RealNode] = []

    def found(self, name: str, *arguments: str, model: Path = MODEL) -> RealNode:
        """The first node: makes the mesh and serves."""
        node = RealNode(self.folder, name)
        self.nodes.append(node)
        node.start("serve", str(model), *arguments)
        node.await_running()
        return node

    def join(self, name: str, *arguments: str) -> RealNode:
        """Another node, by an invite of the first."""
        node = RealNode(self.folder, name)
        self.nodes.append(node)
        node.start("join", self.nodes[0].invite(), *arguments)
        node.await_running()
        return node

    def close(self) -> None:
        for node in self.nodes:
            if node.process is not None and node.process.poll() is None:
                node.process.kill()
                node.process.wait(WAIT_S)
            node.close_clients()
