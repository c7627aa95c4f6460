"""From one run to the next under load: real nodes, real stages, the official client, and no error."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from meshnode.demo import EXPECTED_ANSWER, QUESTION
from tests.e2e.nodes import RealMesh, RealNode, run_cli, until
from tests.e2e.test_answers import MODEL_ID, ask
from tests.e2e.test_losses import LongStream, answers_again, three_nodes

pytestmark = pytest.mark.e2e

ROOMY = ("--memory", "500MB")
"""The whole demonstration model, twice."""


SHARE = 700
"""Tokens of a stream: two of them leave cells of the context for short questions."""


class Load:
    """Short questions, one after the other, until it is stopped; whatever goes wrong is kept."""

    def __init__(self, node: RealNode) -> None:
        self.answers = 0
        self.errors: list[Exception] = []
        self._client = node.client()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        while not self._stopped.is_set():
            try:
                assert ask(self._client, QUESTION) == EXPECTED_ANSWER
                self.answers += 1
            except (openai.APIError, httpx.HTTPError, AssertionError) as error:
                self.errors.append(error)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(60)


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[RealMesh]:
    """One stage somewhere, and two machines beside it that could hold it as well."""
    made = RealMesh(tmp_path)
    try:
        made.found("one", "--context", "2048", *ROOMY)
        made.join("two", *ROOMY)
        made.join("three", *ROOMY)
        until("the model is served", made.nodes[0].serving)
        for node in made.nodes:
            until(f"{node.name} lists it", lambda node=node: node.ready())
        yield made
    finally:
        made.close()


def used(mesh: RealMesh) -> set[str]:
    found = mesh.nodes[0].serving()
    return {stage["name"] for stage in found["stages"]} if found is not None else set()


def drain(mesh: RealMesh, name: str) -> None:
    result = run_cli("drain", name, "--data", str(mesh.nodes[0].data))
    assert result.returncode == 0, result.stderr


def named(mesh: RealMesh, name: str) -> RealNode:
    return next(node for node in mesh.nodes if node.name == name)


def test_a_machine_is_spared_under_load_and_no_client_notices(roomy: RealMesh) -> None:
    (leaver,) = used(roomy)
    streams = [LongStream(node, SHARE) for node in roomy.nodes[:2]]
    load = Load(roomy.nodes[2])
    drain(roomy, leaver)
    until("another machine serves", lambda: (now := used(roomy)) and leaver not in now)
    before = load.answers
    until("the new run answers", lambda: load.answers > before + 2)
    for stream in streams:
        assert stream.ended.wait(60)
        assert stream.error is None, "streams of the former run finish there"
    until("the former run is gone", lambda: not named(roomy, leaver).status()["stages"])
    load.stop()
    assert load.errors == []


def test_a_successor_that_dies_while_it_loads_leaves_what_serves(roomy: RealMesh) -> None:
    (leaver,) = used(roomy)
    others = [node for node in roomy.nodes[1:] if node.name != leaver]
    first: dict[str, Any] = roomy.nodes[0].serving() or {}
    load = Load(roomy.nodes[0])
    drain(roomy, leaver)
    victim = until("one of them loads", lambda: next((n for n in others if n.status()["stages"]), None))
    victim.stop(signal.SIGKILL)
    in_time = used(roomy) == {leaver}
    spared = {node.name for node in roomy.nodes} - {leaver, victim.name}
    until("the last one serves", lambda: used(roomy) and used(roomy) <= spared)
    load.stop()
    if in_time:  # else it had loaded, and served, before it was killed: then clients may notice
        assert load.errors == []
    now = roomy.nodes[0].serving()
    assert now is not None
    assert now["term"] > first["term"]


def test_a_machine_that_is_switched_off_hands_over_first(roomy: RealMesh) -> None:
    """It has 2.5 s: enough where the bytes are there and the model is small."""
    drain(roomy, "one")
    (leaver,) = until("another machine serves", lambda: (now := used(roomy)) and "one" not in now and now)
    load = Load(roomy.nodes[0])
    until("it answers", lambda: load.answers > 1)
    assert named(roomy, leaver).stop() == 0
    before = load.answers
    until("its successor answers", lambda: load.answers > before + 2)
    load.stop()
    assert leaver not in used(roomy)
    # Where the machines are too loaded for that, a request gets a typed error; none gets a wrong answer.
    assert all(isinstance(error, openai.APIError) for error in load.errors)


def test_after_a_killed_stage_the_others_stay_loaded(tmp_path: Path) -> None:
    mesh = three_nodes(tmp_path)
    try:
        victim = mesh.nodes[1]
        before = {node.name: set(node.status()["stages"].values()) for node in mesh.nodes}
        run = mesh.nodes[0].serving()
        os.kill(next(iter(before["two"])), signal.SIGKILL)
        until("a new run serves", lambda: (now := mesh.nodes[0].serving()) and now["run"] != run["run"])
        after = {node.name: set(node.status()["stages"].values()) for node in mesh.nodes}
        assert after["two"] != before["two"]
        assert {name: after[name] for name in ("one", "three")} == {name: before[name] for name in ("one", "three")}
        answers_again(mesh)
        assert victim.status()["counters"]["fetched_bytes"] > 0
    finally:
        mesh.close()


def test_where_memory_holds_one_run_only_requests_wait_or_are_told_to_come_again(tmp_path: Path) -> None:
    mesh = three_nodes(tmp_path)
    try:
        mesh.join("four", "--memory", "153MB")
        drain(mesh, "three")

        def moved() -> bool:
            body = {"model": MODEL_ID, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
            told = httpx.post(f"{mesh.nodes[1].url}/v1/chat/completions", json=body, timeout=60)
            refused = told.status_code == 503 and "retry-after" in told.headers
            assert refused or told.json()["choices"][0]["message"]["content"] == EXPECTED_ANSWER
            return bool(used(mesh)) and "three" not in used(mesh)

        until("the fourth takes the place of the third", moved)
        answers_again(mesh)
        until("the third is free", lambda: not mesh.nodes[2].status()["stages"])
    finally:
        mesh.close()
