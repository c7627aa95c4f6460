"""A new run fails at each of its steps, on each of its machines, while the old run streams: no client notices.

One machine serves the whole model; two others can hold a half each. The first one is drained, and real faults meet the
run that is to take its place: machines and stage processes that are stopped and killed, disks that cannot be written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from meshnode.demo import EXPECTED_ANSWER, MODEL
from meshnode.io.stage.process import MODULE
from tests.e2e.harm import answers
from tests.e2e.nodes import WAIT_S, RealMesh, RealNode, give_way, until
from tests.e2e.test_answers import MODEL_ID

pytestmark = pytest.mark.e2e

HALF = ("--memory", "153500000")
"""A half of the demonstration model with its buffers, and not the whole."""
TOKENS = 700
"""Of a stream: a second or two; another one follows."""


class Streams:
    """One stream after the other until it is stopped; each must come to its end."""

    def __init__(self, node: RealNode) -> None:
        self.ended = 0
        self.errors: list[str] = []
        self.begun = threading.Event()
        self._client = node.client()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert self.begun.wait(WAIT_S)

    def _read(self) -> None:
        while not self._stopped.is_set():
            try:
                tokens = 0
                for part in self._client.completions.create(
                    model=MODEL_ID,
                    prompt="A",
                    max_tokens=TOKENS,
                    stream=True,
                    extra_body={"ignore_eos": True, "stream_options": {"include_usage": True}},
                ):
                    self.begun.set()
                    tokens = part.usage.completion_tokens if part.usage is not None else tokens
                if tokens != TOKENS:
                    self.errors.append(f"a stream ended after {tokens} tokens")
                self.ended += 1
            except (openai.APIError, httpx.HTTPError) as error:
                self.errors.append(repr(error))
                self.begun.set()

    def stop(self) -> None:
        """After the stream that is under way."""
        self._stopped.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


@dataclass
class Scene:
    """The run that serves, and the machine that is going to be the other run's misfortune."""

    mesh: RealMesh
    victim: RealNode
    other: RealNode

    @property
    def coordinator(self) -> RealNode:
        return self.mesh.nodes[0]

    def drain(self) -> None:
        """What makes the coordinator look for another run."""
        self.coordinator.api("POST", "/api/drain", {"node": self.coordinator.status()["node"], "draining": True})

    def claimed(self, node: RealNode) -> str:
        """How far the new run's stage on `node` is, by that machine's own word; empty before it is granted there."""
        stages = (self._granted(node) or {}).get("stages", ())
        return next((stage["state"] for stage in stages if stage["name"] == node.name), "")

    def run(self) -> str:
        """The new run, by the word of the machine that nothing happens to."""
        return str((self._granted(self.other) or {}).get("run", ""))

    def committed(self, node: RealNode) -> bool:
        found = self._granted(node)
        return found is not None and found["state"] == "serving"

    def await_end(self, run: str) -> None:
        assert run
        until("the run ended", lambda: self.run() != run)

    def _granted(self, node: RealNode) -> dict[str, Any] | None:
        found = node.deployment()
        return found if found is not None and found["stages"] else None


def new_stage(node: RealNode) -> psutil.Process | None:
    """The process of a stage that is being made on `node`, which has no other."""
    assert node.process is not None
    for child in psutil.Process(node.process.pid).children():
        with contextlib.suppress(psutil.Error):
            if MODULE in child.cmdline():
                return child
    return None


def at_once(what: str, look: Callable[[], psutil.Process | None]) -> psutil.Process:
    """As `until`, for what is over in a moment."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        found = look()
        if found is not None:
            return found
        give_way(0.002)
    raise AssertionError(f"never happened: {what}")


# --- the faults -----------------------------------------------------------------------------------------------


def a_machine_freezes_before_the_claim(scene: Scene) -> None:
    assert scene.victim.process is not None
    os.kill(scene.victim.process.pid, signal.SIGSTOP)
    scene.drain()
    scene.await_end(until("the other one is claimed", scene.run))
    os.kill(scene.victim.process.pid, signal.SIGCONT)


def a_disk_takes_no_slice(scene: Scene) -> None:
    (record,) = scene.coordinator.data.glob("cache/*/probe-q8_0.json")
    cache = scene.victim.data / "cache" / record.parent.name
    if cache.is_dir():
        shutil.rmtree(cache)
    cache.write_bytes(b"a file where the folder of the slices should be")
    scene.drain()
    until("the slice could not be laid down", lambda: "cache cannot be used" in scene.victim.words())
    until("the run ended", lambda: scene.run() == "")
    cache.unlink()


def a_stage_dies_while_it_loads(scene: Scene) -> None:
    scene.drain()
    stage = at_once("a stage is made", lambda: new_stage(scene.victim))
    stage.suspend()
    run = scene.run()
    assert scene.claimed(scene.victim) in {"claimed", "fetching", "fetched", "loading"}
    stage.kill()
    scene.await_end(run)


def a_stage_dies_at_the_probe(scene: Scene) -> None:
    """Both are loaded, so the head connects them; the probe meets a stage that does not answer."""
    scene.drain()
    late = at_once("the other stage is made", lambda: new_stage(scene.other))
    late.suspend()
    until("the stage is loaded", lambda: scene.claimed(scene.victim) == "ready")
    stage = new_stage(scene.victim)
    assert stage is not None
    stage.suspend()
    late.resume()
    until("the head connects them", lambda: scene.claimed(scene.other) in {"ready", "connected"})
    assert not scene.committed(scene.other)
    run = scene.run()
    stage.kill()
    scene.await_end(run)


def a_machine_dies_before_it_has_committed(scene: Scene) -> None:
    """Its disk takes no word more once it has granted: the others commit, and it cannot."""
    scene.drain()
    late = at_once("the other stage is made", lambda: new_stage(scene.other))
    late.suspend()
    until("the run is granted", lambda: scene.claimed(scene.victim))
    ledger = scene.victim.data / "ledger"
    kept = ledger.read_bytes()
    ledger.unlink()
    ledger.mkdir()
    late.resume()
    until("the other one has committed", lambda: scene.committed(scene.other))
    run = scene.run()
    scene.victim.stop(signal.SIGKILL)
    scene.await_end(run)
    ledger.rmdir()
    ledger.write_bytes(kept)
    (scene.victim.data / "node.json").unlink()
    scene.victim.start("join", *HALF)
    scene.victim.await_running()


FAULTS = [
    a_machine_freezes_before_the_claim,
    a_disk_takes_no_slice,
    a_stage_dies_while_it_loads,
    a_stage_dies_at_the_probe,
    a_machine_dies_before_it_has_committed,
]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealMesh]:
    made = RealMesh(tmp_path_factory.mktemp("mesh"))
    try:
        made.found("one", "--context", "2048", "--memory", "500MB")
        made.join("two", *HALF)
        made.join("three", *HALF)
        until("the model is served", made.nodes[0].serving)
        yield made
    finally:
        made.close()


@pytest.fixture
def whole(mesh: RealMesh) -> Iterator[RealMesh]:
    """The model is served by the first machine alone, anew, so that nothing is held against the others."""
    one = mesh.nodes[0]
    until("all are linked", lambda: one.linked() == 2)
    one.api("POST", "/api/drain", {"node": one.status()["node"], "draining": False})
    one.api("POST", "/api/models/unload", {"model": MODEL_ID})
    until("it is gone everywhere", lambda: not any(node.status()["stages"] for node in mesh.nodes))
    until("it may be loaded again", lambda: _loaded(one))
    until("it is served whole", lambda: (now := one.serving()) and len(now["stages"]) == 1)
    until("it answers", one.ready)
    yield mesh
    for node in mesh.nodes:  # what a test that failed left behind
        assert node.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(node.process.pid, signal.SIGCONT)


def _loaded(node: RealNode) -> bool:
    try:
        node.api("POST", "/api/models", {"path": str(Path(MODEL).absolute()), "context": 2048})
    except AssertionError:
        return False  # the one before is still being closed
    return True


@pytest.mark.parametrize("place", [1, 2], ids=["two", "three"])
@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_whatever_goes_wrong_with_a_new_run_the_old_one_streams_on(
    whole: RealMesh, fault: Callable[[Scene], None], place: int
) -> None:
    one = whole.nodes[0]
    scene = Scene(whole, whole.nodes[place], whole.nodes[3 - place])
    streams = Streams(one)
    fault(scene)
    assert one.serving() is not None
    assert answers(one) == EXPECTED_ANSWER
    before = streams.ended
    until("the stream of that time has come to its end", lambda: streams.ended > before)
    streams.stop()
    assert streams.errors == []
    assert one.serving() is not None
