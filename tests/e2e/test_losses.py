"""What happens when processes die, freeze, leave or come back. Each test has a mesh of its own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from meshnode.demo import EXPECTED_ANSWER, MODEL, QUESTION
from tests.e2e.conftest import MEMORY, three_nodes
from tests.e2e.nodes import RealMesh, RealNode, until
from tests.e2e.test_answers import MODEL_ID, ask

pytestmark = pytest.mark.e2e


@pytest.fixture
def own_mesh(tmp_path: Path) -> Iterator[RealMesh]:
    made = three_nodes(tmp_path)
    yield made
    made.close()


def answers_again(mesh: RealMesh, node: int = 0) -> None:
    """The run was rebuilt by itself: an answer comes, and it is right."""

    def answer() -> str | None:
        try:
            return ask(mesh.nodes[node].client(), QUESTION)
        except openai.APIStatusError:
            return None

    assert until("the model answers again", answer) == EXPECTED_ANSWER


class LongStream:
    """A stream that lasts until something ends it."""

    def __init__(self, node: RealNode, tokens: int = 2000) -> None:
        self._tokens = tokens
        self.begun = threading.Event()
        self.error: Exception | None = None
        self.ended = threading.Event()
        self._client = node.client()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert self.begun.wait(60)

    def _read(self) -> None:
        try:
            stream = self._client.completions.create(
                model=MODEL_ID,
                prompt="A",
                max_tokens=self._tokens,
                stream=True,
                temperature=1,
                extra_body={"ignore_eos": True},
            )
            for _ in stream:
                self.begun.set()
        except (openai.APIError, httpx.HTTPError) as error:
            self.error = error
        finally:
            self.begun.set()
            self.ended.set()


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_stage_gives_a_typed_error_and_the_next_request_works(own_mesh: RealMesh, victim: int) -> None:
    first = own_mesh.nodes[0].serving()
    stage = first["stages"][victim]
    owner = next(node for node in own_mesh.nodes if node.name == stage["name"])
    stream = LongStream(own_mesh.nodes[1])
    os.kill(next(iter(owner.status()["stages"].values())), signal.SIGKILL)
    assert stream.ended.wait(60)
    assert isinstance(stream.error, openai.APIError)
    answers_again(own_mesh)
    assert own_mesh.nodes[0].serving()["run"] != first["run"]


def test_a_frozen_stage_is_given_up_and_replaced(own_mesh: RealMesh) -> None:
    owner = own_mesh.nodes[2]
    pid = next(iter(owner.status()["stages"].values()))
    run = own_mesh.nodes[0].serving()["run"]
    os.kill(pid, signal.SIGSTOP)

    def replaced() -> bool:
        found = own_mesh.nodes[0].serving()
        return found is not None and found["run"] != run

    until("a new run serves", replaced)
    answers_again(own_mesh)


def test_a_killed_node_is_served_without_it_once_it_is_back(own_mesh: RealMesh) -> None:
    victim = own_mesh.nodes[2]
    victim.stop(signal.SIGKILL)
    until("the run ended", lambda: own_mesh.nodes[0].serving() is None)
    with pytest.raises(openai.APIStatusError) as unavailable:
        ask(own_mesh.nodes[0].client(), QUESTION)
    assert unavailable.value.status_code == 503
    assert "retry-after" in unavailable.value.response.headers
    victim.start("join", *MEMORY)
    victim.await_running()
    answers_again(own_mesh)
    assert victim.status()["counters"]["fetched_bytes"] == 0, "a second start moves no weight bytes"


def test_a_joiner_fetches_its_slice_and_nothing_the_second_time(own_mesh: RealMesh) -> None:
    joiner = own_mesh.nodes[1]
    fetched = joiner.status()["counters"]["fetched_bytes"]
    stage = next(s for s in own_mesh.nodes[0].serving()["stages"] if s["name"] == joiner.name)
    assert 0 < fetched <= stage["weight_bytes"] * 2
    assert joiner.stop() == 0
    until("the run ended", lambda: own_mesh.nodes[0].serving() is None)
    joiner.start("join", *MEMORY)
    joiner.await_running()
    answers_again(own_mesh, node=1)
    assert joiner.status()["counters"]["fetched_bytes"] == 0


def test_a_node_leaves_cleanly_and_its_streams_get_a_terminal_event(own_mesh: RealMesh) -> None:
    stream = LongStream(own_mesh.nodes[0])
    assert own_mesh.nodes[0].stop() == 0
    assert stream.ended.wait(60)
    assert isinstance(stream.error, openai.APIError)
    for node in own_mesh.nodes[1:]:
        until("it is seen as left", lambda node=node: any(p["state"] == "left" for p in node.status()["peers"]))
        # Loaded slices wait for a node that goes on with the model; two of three have not got the memory for it.
        until("its lease ended", lambda node=node: node.status()["stages"] == {})


def test_the_founder_restarts_and_serves_with_the_members_it_knows(own_mesh: RealMesh) -> None:
    founder = own_mesh.nodes[0]
    assert founder.stop() == 0
    founder.start("serve", str(MODEL), "--context", "2048", *MEMORY)
    founder.await_running()
    answers_again(own_mesh)


def test_a_node_that_comes_back_grants_nothing_before_its_former_stages_are_gone(tmp_path: Path) -> None:
    mesh = RealMesh(tmp_path)
    try:
        node = mesh.found("one", "--context", "2048", "--memory", "500MB")
        until("the model is served", node.serving)
        old = psutil.Process(next(iter(node.status()["stages"].values())))
        old.suspend()  # it will not notice that its node is gone
        node.stop(signal.SIGKILL)
        assert old.status() == psutil.STATUS_STOPPED
        (node.data / "node.json").unlink()  # of the killed one
        node.start("serve", str(MODEL), "--context", "2048", "--memory", "500MB")
        node.await_running()
        assert not old.is_running() or old.status() == psutil.STATUS_ZOMBIE, "it was gone before the node answered"
        until("the model is served again", node.serving)
        assert f"process {old.pid}, a stage of this node's former life, is ended" in node.words()
        answers_again(mesh)
    finally:
        mesh.close()
