"""Every family of routes on three real nodes: where the head runs, and where it does not."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from meshnode.demo import EXPECTED_ANSWER, QUESTION
from tests.e2e.nodes import WAIT_S, RealMesh, run_cli

pytestmark = pytest.mark.e2e

MESSAGES = [{"role": "user", "content": QUESTION}]


def post(mesh: RealMesh, node: int, path: str, body: dict[str, Any]) -> Any:
    response = httpx.post(f"{mesh.nodes[node].url}{path}", json=body, timeout=WAIT_S)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("node", [0, 1])
def test_what_was_tokenized_is_detokenized_and_answered_alike(mesh: RealMesh, node: int) -> None:
    prompt = post(mesh, node, "/apply-template", {"messages": MESSAGES})["prompt"]
    tokens = post(mesh, node, "/tokenize", {"messages": MESSAGES})["tokens"]
    bare = post(mesh, node, "/tokenize", {"content": prompt})["tokens"]
    assert post(mesh, node, "/detokenize", {"tokens": bare})["content"] == prompt
    completion = {"prompt": tokens, "max_tokens": 200, "temperature": 0}
    assert post(mesh, node, "/v1/completions", completion)["choices"][0]["text"] == EXPECTED_ANSWER
    info = httpx.get(f"{mesh.nodes[node].url}/tokenizer_info", timeout=WAIT_S).json()
    assert info["eos_token"]
    assert info["eos_token"] not in EXPECTED_ANSWER


@pytest.mark.parametrize("node", [0, 1])
def test_every_node_tells_what_it_did(mesh: RealMesh, node: int) -> None:
    url = mesh.nodes[node].url
    post(mesh, 0, "/v1/completions", {"prompt": "A node", "max_tokens": 4, "ignore_eos": True})
    page = httpx.get(f"{url}/metrics", timeout=WAIT_S).text
    assert 'meshnode_stage_rows{deployment="' in page
    assert "meshnode_node_loop_lag_worst_ms" in page
    assert ('meshnode_time_to_first_token_seconds_count{model="meshnode-demo"}' in page) == (node == 0)
    props = httpx.get(f"{url}/props", timeout=WAIT_S).json()
    assert (props["model_alias"], props["total_slots"]) == ("meshnode-demo", 4)
    assert len(httpx.get(f"{url}/slots?model=meshnode-demo", timeout=WAIT_S).json()) == 4
    told = json.loads(run_cli("status", "--json", "--data", str(mesh.nodes[node].data)).stdout)
    assert [head["lanes_busy"] for head in told["heads"].values()] == ([0] if node == 0 else [])


@pytest.mark.parametrize("node", [0, 2])
def test_responses_and_messages_give_the_words_of_the_chat(mesh: RealMesh, node: int) -> None:
    spoken = mesh.nodes[node].client().responses.create(model="meshnode-demo", input=QUESTION, temperature=0)
    assert spoken.output_text == EXPECTED_ANSWER
    body = {"model": "meshnode-demo", "max_tokens": 300, "messages": MESSAGES, "temperature": 0}
    whole = post(mesh, node, "/v1/messages", body)
    assert (whole["content"], whole["stop_reason"]) == ([{"type": "text", "text": EXPECTED_ANSWER}], "end_turn")
    counted = post(mesh, node, "/v1/messages/count_tokens", {"messages": MESSAGES})
    usage = whole["usage"]
    assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    text = ""
    with httpx.stream("POST", f"{mesh.nodes[node].url}/v1/messages", json={**body, "stream": True}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: ") and '"text_delta"' in line:
                text += json.loads(line.removeprefix("data: "))["delta"]["text"]
    assert text == EXPECTED_ANSWER


def test_a_prompt_that_was_asked_before_is_not_computed_again_wherever_it_was_asked(mesh: RealMesh) -> None:
    body = {"model": "meshnode-demo", "messages": MESSAGES, "temperature": 0}
    answers = [post(mesh, node, "/v1/chat/completions", body) for node in (0, 2, 1)]
    answers.append(post(mesh, 0, "/v1/chat/completions", {**body, "cache_prompt": False}))
    assert {answer["choices"][0]["message"]["content"] for answer in answers} == {EXPECTED_ANSWER}
    usages = [answer["usage"] for answer in answers]
    held = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert held[1:] == [usages[0]["prompt_tokens"] - 1] * 2 + [0]
    page = httpx.get(f"{mesh.nodes[0].url}/metrics", timeout=WAIT_S).text
    counted = next(line for line in page.splitlines() if line.startswith("meshnode_prompt_tokens_cached_total{"))
    assert float(counted.split()[-1]) >= sum(held)
