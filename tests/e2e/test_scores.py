"""Log-likelihoods of texts, asked as evaluation programs ask: from every node the same as from one machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from meshnode.demo import ANSWERS, LONG_QUESTION, QUESTION
from tests.e2e.likelihood import log_likelihood, one_machine, tokens
from tests.e2e.nodes import WAIT_S, RealMesh

pytestmark = [pytest.mark.e2e, pytest.mark.native]

QUESTIONS = (QUESTION, LONG_QUESTION)
PAIRS = [(f"<|user|>{question}<|end|><|assistant|>", ANSWERS[other]) for question in QUESTIONS for other in QUESTIONS]


def scored(mesh: RealMesh, node: int, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "meshnode-demo", "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, **fields}
    answer = httpx.post(f"{mesh.nodes[node].url}/v1/completions", json=body, timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


@pytest.fixture(scope="module")
def wanted() -> list[tuple[list[int], int, float, bool]]:
    """Ids, tokens of the context among them, log-likelihood of the rest, and whether that is the greedy answer."""
    with one_machine() as model:
        return [
            (tokens(model, context + answer), len(tokens(model, context)), *log_likelihood(model, context, answer))
            for context, answer in PAIRS
        ]


@pytest.mark.parametrize("node", [0, 1, 2])
def test_every_node_tells_the_log_likelihoods_of_one_machine(mesh: RealMesh, wanted: Any, node: int) -> None:
    for (ids, context, likely, best), choice in zip(
        wanted, scored(mesh, node, prompt=[ids for ids, *_ in wanted]), strict=True
    ):
        found = choice["logprobs"]
        assert len(found["token_logprobs"]) == len(ids) + 1
        told = found["token_logprobs"][context:-1]
        # Activations in f16 and a quantized KV cache move each token a little.
        assert sum(told) == pytest.approx(likely, rel=0.02, abs=0.05)
        tops = [max(top.values()) for top in found["top_logprobs"][context:-1]]
        assert (told == tops) is best


def test_what_was_computed_before_and_what_runs_beside_a_prompt_changes_none_of_its_scores(
    mesh: RealMesh, wanted: Any
) -> None:
    ids = wanted[1][0]
    alone = scored(mesh, 0, prompt=[ids])[0]["logprobs"]["token_logprobs"]
    with ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(scored, mesh, number % 3, prompt=[ids[: len(ids) - number]]) for number in range(8)]
        beside = [choices.result()[0]["logprobs"]["token_logprobs"] for choices in asked]
    for number, told in enumerate(beside):
        length = len(ids) - number
        assert told[0] is None
        assert told[1:length] == pytest.approx(alone[1:length], abs=0.05)


def test_a_text_may_be_scored_without_a_new_token_whole_and_streamed(mesh: RealMesh) -> None:
    text = f"<|user|>{QUESTION}<|end|>"
    (choice,) = scored(mesh, 1, prompt=text, max_tokens=0)
    assert choice["text"] == "".join(choice["logprobs"]["tokens"]) == text
    assert choice["finish_reason"] == "length"
    body = {"model": "meshnode-demo", "prompt": text, "max_tokens": 0, "logprobs": 1, "echo": True, "stream": True}
    streamed = httpx.post(f"{mesh.nodes[2].url}/v1/completions", json=body, timeout=WAIT_S).text
    assert streamed.endswith("data: [DONE]\n\n")
