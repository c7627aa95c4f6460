"""`meshnode` as a person runs it: a process of its own, heard line by line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A start takes 2 s on an idle machine; a hang fails instead of stalling.
PATIENCE_S = 60


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MESHNODE_")}
    return {**kept, "PYTHONUNBUFFERED": "1", "MESHNODE_MEASURE": "false"}


def meshnode(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "meshnode.app.cli", *arguments],
        env=_environment(),
        input=stdin,
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


class Foreground:
    """A running node."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.heard: list[str] = []

    def until(self, words: str) -> str:
        """The first line that holds `words`; fails when the process ends before."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.heard.append(line.rstrip())
            if words in line:
                return line.rstrip()
        raise AssertionError(f"{words!r} was never said:\n" + "\n".join(self.heard))


@contextmanager
def node(data: Path, *arguments: str) -> Iterator[Foreground]:
    """A node on loopback with free ports, killed at the end if it is still there."""
    flags = ("--data", str(data), "--listen", "127.0.0.1", "--port", "0", "--api-port", "0", "--threads", "1")
    command = [sys.executable, "-m", "meshnode.app.cli", *arguments, *flags]
    with subprocess.Popen(
        command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield Foreground(process)
        finally:
            process.kill()
