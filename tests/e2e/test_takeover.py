"""A model goes on when the node that coordinates it is gone: killed, left, or come back too late. Real processes."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from meshnode.demo import EXPECTED_ANSWER, MODEL, QUESTION
from tests.e2e.nodes import RealMesh, RealNode, run_cli, until
from tests.e2e.test_answers import ask

pytestmark = pytest.mark.e2e

HALF = ("--memory", "220MB")
"""Room for more than a half of the demonstration model, and for less than the whole."""


def answers(node: RealNode) -> bool:
    try:
        return ask(node.client(), QUESTION) == EXPECTED_ANSWER
    except (openai.APIError, httpx.HTTPError):
        return False


def pids(node: RealNode) -> list[int]:
    return sorted(node.status()["stages"].values())


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[RealMesh]:
    """Coordinated by one, which takes no layers; loaded by two and three."""
    made = RealMesh(tmp_path)
    try:
        made.found("one", "--context", "2048", "--memory", "64MB")
        made.join("two", *HALF)
        made.join("three", *HALF)
        until("the model is served", made.nodes[0].serving)
        for node in made.nodes:
            until(f"{node.name} answers", lambda node=node: answers(node))
        yield made
    finally:
        made.close()


def coordinator(node: RealNode) -> str:
    found = node.serving()
    return "" if found is None else found["coordinator"]


def test_a_killed_coordinator_is_followed_and_no_stage_is_loaded_again(mesh: RealMesh) -> None:
    one, *others = mesh.nodes
    dead, before = one.status()["node"], {node.name: pids(node) for node in others}
    one.stop(signal.SIGKILL)
    began = time.monotonic()
    for node in others:
        until(f"{node.name} answers again", lambda node=node: answers(node))
    print(f"taken over after {time.monotonic() - began:.1f} s")
    assert {node.name: pids(node) for node in others} == before, "the loaded slices were adopted"
    assert {coordinator(node) for node in others} <= {node.status()["node"] for node in others}
    run = others[0].serving()["run"]
    one.start("serve", str(MODEL), "--context", "2048", "--memory", "64MB")
    one.await_running()
    until("the first one is back", lambda: answers(one))
    assert others[0].serving()["run"] == run, "who comes back disturbs nothing"
    assert coordinator(one) != dead


def gone(node: RealNode) -> bool:
    return not node.status()["deployments"]


def test_a_coordinator_that_leaves_is_followed_and_anybody_may_unload(mesh: RealMesh) -> None:
    one, two, three = mesh.nodes
    before = {node.name: pids(node) for node in (two, three)}
    assert one.stop() == 0
    for node in (two, three):
        until(f"{node.name} answers again", lambda node=node: answers(node))
    assert {node.name: pids(node) for node in (two, three)} == before, "the loaded slices were adopted"
    assert run_cli("unload", "meshnode-demo", "--data", str(three.data)).returncode == 0
    for node in (two, three):
        until(f"{node.name} has none of it", lambda node=node: gone(node) and not pids(node))
    one.start("join", "--memory", "64MB")
    one.await_running()
    until("the first one is back", lambda: one.linked() == 2)
    until("it heard that the model was unloaded", lambda: gone(one))


def test_a_coordinator_that_held_the_whole_model_is_followed_by_who_has_its_bytes(tmp_path: Path) -> None:
    mesh = RealMesh(tmp_path)

    def holds(name: str) -> bool:
        found = mesh.nodes[0].serving()
        return found is not None and [stage["name"] for stage in found["stages"]] == [name]

    def drain(name: str) -> None:
        """Have its layers move, then give it work again."""
        one = mesh.nodes[0]
        assert run_cli("drain", name, "--data", str(one.data)).returncode == 0
        until(f"{name} holds nothing", lambda: one.serving() and not holds(name))
        assert run_cli("drain", name, "--undo", "--data", str(one.data)).returncode == 0

    try:
        one = mesh.found("one", "--context", "2048", "--memory", "500MB")
        until("one serves it alone", lambda: holds("one"))
        two = mesh.join("two", "--memory", "500MB")
        until("they are linked", lambda: one.linked() == 1)
        drain("one")
        drain("two")
        until("one has it again", lambda: holds("one"))
        until("two kept the bytes", lambda: pids(two) == [])
        one.stop(signal.SIGKILL)
        began = time.monotonic()
        until("two answers", lambda: answers(two))
        print(f"taken over from a coordinator with the stage after {time.monotonic() - began:.1f} s")
        assert two.serving()["coordinator"] == two.status()["node"]
    finally:
        mesh.close()


def test_a_model_is_there_again_after_its_node_was_restarted_without_naming_it(tmp_path: Path) -> None:
    mesh = RealMesh(tmp_path)
    try:
        one = mesh.found("one", "--context", "2048", "--memory", "500MB")
        until("it answers", lambda: answers(one))
        deployment = one.serving()["deployment"]
        one.stop(signal.SIGKILL)
        one.start("join", "--memory", "500MB")
        one.await_running()
        until("it answers again", lambda: answers(one))
        assert one.serving()["deployment"] == deployment
        assert one.stop() == 0
        one.start("serve", str(MODEL), "--context", "2048", "--memory", "500MB")
        one.await_running()
        until("it answers again", lambda: answers(one))
        assert [each["deployment"] for each in one.status()["deployments"]] == [deployment], "it is not asked for twice"
    finally:
        mesh.close()
