"""A client in a process of its own: one JSON line asks for something, one JSON line tells what the client saw.

The scripts in `actors/` use their client as its users do and translate nothing but names, so that `contract.py` can
ask the same of all of them. What a client raises comes back as `Refused` with the classes by which its users catch it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ANSWER_S = 120
"""Far above any answer of the demonstration model, importing the client included; a hang still ends."""
ACTORS = Path(__file__).parent / "actors"


class Refused(Exception):
    """What the client raised."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(json.dumps(error))
        self.kinds: list[str] = error["kinds"]
        self.status: int | None = error.get("status")
        self.code: str | int | None = error.get("code")
        self.message: str = error["message"]


class Actor:
    """One client, pointed at one endpoint."""

    def __init__(self, command: Sequence[str | Path], base_url: str, key: str) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "PYTHONPATH"))}
        own = {
            "BASE_URL": base_url,
            "API_KEY": key,
            "PYTHONUNBUFFERED": "1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }
        self._process = subprocess.Popen(
            [str(part) for part in command],
            env={**kept, **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._complaints: list[str] = []
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._complain)]
        for reader in self._readers:
            reader.start()

    def do(self, what: str, **ask: Any) -> Any:
        """What the client saw; Refused with what it raised."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, "ask": ask}) + "\n")
        self._process.stdin.flush()
        try:
            line = self._answers.get(timeout=ANSWER_S)
        except queue.Empty:
            raise AssertionError(f"no answer to {what}:\n{''.join(self._complaints)}") from None
        assert line, f"the client ended:\n{''.join(self._complaints)}"
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["saw"]

    def close(self) -> None:
        """End of input ends the script."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(ANSWER_S)
        finally:
            self._process.kill()
            self._process.wait()
            for reader in self._readers:
                reader.join(ANSWER_S)
            for stream in (self._process.stdout, self._process.stderr):
                assert stream is not None
                stream.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _complain(self) -> None:
        assert self._process.stderr is not None
        self._complaints.extend(self._process.stderr)


@contextmanager
def acting_in_python(interpreter: Path, script: str, url: str, key: str = "unused") -> Iterator[Actor]:
    """The client that `script` drives, in the environment of `interpreter`."""
    with contextlib.closing(Actor([interpreter, ACTORS / script], f"{url}/v1", key)) as actor:
        yield actor


@contextmanager
def acting_in_node(place: Path, script: str, url: str, key: str = "unused") -> Iterator[Actor]:
    """The client that `script` drives; Node looks for packages beside the script, so it is copied there."""
    for name in ("protocol.mjs", script):
        shutil.copy(ACTORS / name, place / name)
    with contextlib.closing(Actor(["node", place / script], f"{url}/v1", key)) as actor:
        yield actor
