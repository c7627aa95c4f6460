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
from tests.e2e.nodes import RealMesh, RealNode, until
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
    print(f"taken over after {time.monotonic() - began:.1f} s")  # noqa: T201 - for the report
    assert {node.name: pids(node) for node in others} == before, "the loaded slices were adopted"
    assert {coordinator(node) for node in others} <= {node.status()["node"] for node in others}
    run = others[0].serving()["run"]
    one.start("serve", str(MODEL), "--context", "2048", "--memory", "64MB")
    one.await_running()
    until("the first one is back", lambda: answers(one))
    assert others[0].serving()["run"] == run, "who comes back disturbs nothing"
    assert coordinator(one) != dead
