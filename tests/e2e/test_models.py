"""What a person does with models and machines of a running mesh: load, unload, drain, look at a cut-over."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from meshnode.demo import EXPECTED_ANSWER, MODEL, QUESTION
from tests.e2e.nodes import RealMesh, RealNode, run_cli, until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealMesh]:
    """Two nodes; the second alone has room for the whole model, and for a second one."""
    made = RealMesh(tmp_path_factory.mktemp("mesh"))
    try:
        made.found("one", "--context", "2048", "--memory", "153MB")
        made.join("two", "--memory", "700MB")
        until("the first model is served", made.nodes[0].serving)
        yield made
    finally:
        made.close()


def asked(node: RealNode, *arguments: str) -> tuple[int, str]:
    result = run_cli(*arguments, "--data", str(node.data))
    return result.returncode, result.stdout + result.stderr


def ask(node: RealNode, model: str) -> str:
    message: Any = {"role": "user", "content": QUESTION}
    answer = node.client().chat.completions.create(model=model, messages=[message], temperature=0)
    return answer.choices[0].message.content or ""


def listed(node: RealNode) -> set[str]:
    """What its endpoint answers for."""
    models = httpx.get(f"{node.url}/v1/models", timeout=60).json()["data"]
    return {model["id"] for model in models if model["meta"]["state"] == "ready"}


def states(node: RealNode) -> dict[str, Any]:
    return {each["model"]: each for each in node.status()["deployments"] if each["state"] == "serving"}


def test_a_second_model_is_loaded_answers_beside_the_first_and_goes_again(mesh: RealMesh, tmp_path: Path) -> None:
    one, two = mesh.nodes
    second = tmp_path / "second.gguf"
    shutil.copy(MODEL, second)
    code, text = asked(one, "load", str(second), "--context", "512", "--cuts", "4", "--json")
    assert (code, json.loads(text)) == (0, {"model": "second"})
    until("both are served", lambda: {"meshnode-demo", "second"} <= states(one).keys())
    assert [(stage["first"], stage["last"]) for stage in states(one)["second"]["stages"]] == [(0, 4), (4, 10)]
    until("the other node lists it", lambda: "second" in listed(two))
    assert [ask(two, name) for name in ("meshnode-demo", "second")] == [EXPECTED_ANSWER, EXPECTED_ANSWER]
    assert asked(one, "load", str(second))[0] == 2, "it is served already"
    assert asked(two, "unload", "second")[0] == 0, "any member may want it no more"
    until("it is gone", lambda: "second" not in listed(one) | listed(two))
    assert ask(two, "meshnode-demo") == EXPECTED_ANSWER


@pytest.mark.parametrize(
    ("file", "options", "words"),
    [
        ("missing.gguf", (), "there is no model file"),
        ("junk.gguf", (), "junk.gguf"),
        ("good.gguf", ("--kv-type", "q3_x"), "KV type"),
        ("good.gguf", ("--context", "99999999"), "context"),
        ("good.gguf", ("--replicas", "99"), "replicas"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_message_and_nothing_changes(
    file: str, options: tuple[str, ...], words: str, mesh: RealMesh, tmp_path: Path
) -> None:
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + bytes(100))
    shutil.copy(MODEL, tmp_path / "good.gguf")
    code, text = asked(mesh.nodes[0], "load", str(tmp_path / file), *options)
    assert (code, words in text) == (2, True), text
    assert "Traceback" not in text
    assert states(mesh.nodes[0]).keys() == {"meshnode-demo"}


def test_a_dry_run_tells_what_draining_would_leave_and_changes_nothing(mesh: RealMesh) -> None:
    one = mesh.nodes[0]
    before = states(one)["meshnode-demo"]
    code, text = asked(one, "cutover", "--dry-run", "--json")
    assert (code, json.loads(text)["pipelines"][0]["verdict"]) == (0, "keep")
    assert states(one)["meshnode-demo"]["run"] == before["run"]
    assert asked(one, "cutover", "nothing", "--dry-run")[0] == 2
    code, text = asked(one, "drain", "nobody")
    assert (code, "nobody" in text) == (2, True)


def busy(node: RealNode) -> int:
    lanes: int = httpx.get(f"{node.url}/health", timeout=60).json()["lanes_busy"]
    return lanes


def test_of_two_replicas_the_one_that_answers_sooner_gets_the_next_request(mesh: RealMesh, tmp_path: Path) -> None:
    one, two = mesh.nodes
    copy = tmp_path / "twice.gguf"
    shutil.copy(MODEL, copy)
    for node in (one, two):
        assert asked(node, "load", str(copy), "--context", "2048", "--only", "two")[0] == 0
    until("both heads serve it", lambda: {"twice"} <= states(one).keys() & states(two).keys())

    def served() -> int:
        return [(d["model"], d["state"]) for d in one.status()["deployments"]].count(("twice", "serving"))

    until("each serves, and knows of the other's", lambda: served() == 2)
    message: Any = {"role": "user", "content": QUESTION}
    client = one.client()

    def long_answer(_: int) -> int:
        answer = client.chat.completions.create(
            model="twice", messages=[message], max_tokens=400, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(long_answer, range(8))
        until("both heads work at the same time, asked by one node", lambda: busy(one) and busy(two))
        assert list(answers) == [400] * 8
    assert asked(one, "unload", "twice")[0] == 0
    until("both are gone", lambda: "twice" not in listed(one) | listed(two))
    assert asked(two, "unload", "twice")[0] == 2, "there is none any more"


def test_a_drained_machine_hands_on_what_it_has_and_no_stream_hears_of_it(tmp_path: Path) -> None:
    mesh = RealMesh(tmp_path)
    try:
        one = mesh.found("one", "--context", "2048", "--memory", "153MB", "--exclude", "one")
        for name in ("two", "three"):
            mesh.join(name, "--memory", "400MB")
        until("it is served", one.serving)
        held = one.serving()["stages"][0]["name"]
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:

            def ask_on() -> list[str]:
                answers = []
                while not stop.is_set():
                    answers.append(ask(one, "meshnode-demo"))
                return answers

            asking = pool.submit(ask_on)
            try:
                assert asked(one, "drain", held)[0] == 0
                other = until(
                    "the other one has it", lambda: (now := one.serving()) and now["stages"][0]["name"] != held and now
                )
            finally:
                stop.set()
            answers = asking.result(60)
        assert other["term"] > 1
        assert answers
        assert set(answers) == {EXPECTED_ANSWER}
        assert asked(one, "drain", held, "--undo")[0] == 0
        mesh.nodes[0].close_clients()
    finally:
        mesh.close()
