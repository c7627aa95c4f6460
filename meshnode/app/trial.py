"""Nodes on trial: child processes of this command line, as a demonstration or a measurement starts and ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from meshnode.app.cli.control import Control, running_node
from meshnode.errors import Unavailable

Found = TypeVar("Found")

# What a node promises (5 s), and as much again for a busy machine.
LEAVE_S = 10.0


class TrialNode:
    """A child process that runs `meshnode serve` or `meshnode join` on loopback, on free ports."""

    def __init__(self, folder: Path, name: str, *flags: str) -> None:
        """`flags` go with every start; its data directory is `folder`/`name`."""
        self.name = name
        self.data = folder / name
        self._flags = flags
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str, terminal: int | None = None) -> None:
        """`meshnode <arguments>`; its screen and keyboard are `terminal` (a descriptor), or a log and nothing."""
        flags = ["--data", str(self.data), "--name", self.name, "--listen", "127.0.0.1", *self._flags]
        # Settings of a real node on this machine are not meant for these.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MESHNODE_")}
        with self._log.open("wb") as log:
            screen = log.fileno() if terminal is None else terminal
            self._process = subprocess.Popen(
                [sys.executable, "-m", "meshnode.app.cli", *arguments, *flags, "--port", "0", "--api-port", "0"],
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=screen,
                stderr=screen,
                env=environment,
            )

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def ended(self) -> bool:
        """Whether it was started and runs no more."""
        return self._process is not None and self._process.poll() is not None

    @property
    def last_words(self) -> str:
        """The end of its log; 1,500 characters are a screen."""
        return self._log.read_text(errors="replace")[-1500:].strip() if self._log.exists() else ""

    def control(self) -> Control | None:
        """Its `/api`, once it answers."""
        return Control.of(self.data) if self.alive and running_node(self.data) is not None else None

    def ask_to_leave(self) -> None:
        """As Ctrl-C does."""
        if self._process is not None and self.alive:
            self._process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> None:
        """Wait until it has ended; after `seconds` it is killed."""
        if self._process is None:
            return
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def on_trial(nodes: Sequence[TrialNode]) -> Iterator[None]:
    """Ends the nodes however the trial ends; Ctrl-C is an ordinary end and reaches the nodes by itself."""
    interrupted = False
    try:
        yield
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        if not interrupted:
            for node in nodes:
                node.ask_to_leave()
        deadline = time.monotonic() + LEAVE_S
        for node in nodes:
            node.wait(max(0.1, deadline - time.monotonic()))


def awaited(
    look: Callable[[], Found | None], nodes: Sequence[TrialNode], deadline: float, why: Callable[[], str], poll_s: float
) -> Found:
    """Look until there is something. Raises Unavailable when a node that was started ends, or the time is over."""
    while True:
        try:
            found = look()
        except Unavailable:
            found = None
        if found is not None:
            return found
        for node in nodes:
            if node.ended:
                raise Unavailable(f"node {node.name} has ended:\n{node.last_words}")
        if time.monotonic() > deadline:
            raise Unavailable(why())
        time.sleep(poll_s)
