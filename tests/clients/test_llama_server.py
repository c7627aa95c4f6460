"""The same requests to llama.cpp's own server with the whole model and to three nodes that share it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from meshnode.demo import ANSWERS, MODEL, UNICODE_QUESTION
from tests.clients.actor import ACTORS
from tests.clients.answers import ask, post
from tests.clients.contract import MODEL_ID
from tests.clients.differences import AGREED, ANSWERED, REFUSED, chat, user
from tests.clients.environments import python_environment
from tests.e2e.nodes import RealMesh

pytestmark = [pytest.mark.real_client, pytest.mark.own_environment]

LOGPROB_MOVES = 0.001
"""Activations in f16 and a quantized KV cache move it; by 0.00006 at most over these 1,630 tokens."""


@pytest.fixture(scope="module")
def llama_server() -> Iterator[str]:
    """Its address."""
    command = [python_environment("llama_server"), ACTORS / "llama_server.py", MODEL, MODEL_ID, "2048"]
    with subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http://"), "it did not start"
        yield address
        process.kill()


@pytest.mark.parametrize("name", [*ANSWERED, *REFUSED])
def test_both_answer_alike_but_for_what_is_agreed(name: str, llama_server: str, mesh: RealMesh) -> None:
    request = {**ANSWERED, **REFUSED}[name]
    theirs, ours = ask(llama_server, *request), ask(mesh.nodes[1].url, *request)
    agreed, _ = AGREED.get(name, (frozenset(), ""))
    assert ours.differs(theirs) == agreed, f"theirs: {theirs}\nours:   {ours}"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_as_the_clients_fault(name: str, mesh: RealMesh) -> None:
    assert 400 <= ask(mesh.nodes[1].url, *REFUSED[name]).status < 500


# The one left out has characters of several tokens, which llama-server lists as one; its text is compared above.
@pytest.mark.parametrize("question", [question for question in ANSWERS if question != UNICODE_QUESTION])
def test_every_answer_is_theirs_token_for_token_and_as_probable(
    question: str, llama_server: str, mesh: RealMesh
) -> None:
    request = chat(user(question), logprobs=True, top_logprobs=1)
    theirs, ours = (post(url, *request).json()["choices"][0] for url in (llama_server, mesh.nodes[0].url))
    assert ours["message"]["content"] == theirs["message"]["content"]
    # llama-server lists the end token too.
    wanted = theirs["logprobs"]["content"][:-1]
    found = ours["logprobs"]["content"]
    assert [each["bytes"] for each in found] == [each["bytes"] for each in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], abs=LOGPROB_MOVES)


def test_every_agreed_difference_is_of_a_request_that_is_asked() -> None:
    assert set(AGREED) <= {*ANSWERED, *REFUSED}
