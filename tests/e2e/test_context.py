"""Where an answer ends, and what a text is, on three real nodes (the rules that every client counts on)."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from meshnode.demo import EXPECTED_ANSWER, QUESTION
from tests.e2e.nodes import WAIT_S, RealMesh

pytestmark = pytest.mark.e2e

MODEL = "meshnode-demo"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]


def greedy(mesh: RealMesh, node: int, **fields: Any) -> Any:
    client = mesh.nodes[node].client()
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, **fields)


@pytest.mark.parametrize("node", [0, 1])
def test_a_prompt_that_never_fits_is_refused_before_any_work_with_both_sizes(mesh: RealMesh, node: int) -> None:
    def computed() -> int:
        page = httpx.get(f"{mesh.nodes[0].url}/metrics", timeout=WAIT_S).text
        return next(
            int(line.split()[-1]) for line in page.splitlines() if line.startswith("meshnode_head_microbatches")
        )

    before = computed()
    with pytest.raises(openai.BadRequestError) as refused:
        mesh.nodes[node].client().completions.create(model=MODEL, prompt=[5] * 2048, stream=True)
    error: Any = refused.value.body
    assert (error["code"], error["n_prompt_tokens"], error["n_ctx"]) == ("context_length_exceeded", 2048, 2048)
    assert computed() == before


@pytest.mark.parametrize("count", [1, 2, 7, 33])
def test_exactly_max_tokens_are_generated(mesh: RealMesh, count: int) -> None:
    for stream_of in (0, 1):
        answer = (
            mesh.nodes[stream_of]
            .client()
            .completions.create(
                model=MODEL, prompt="A node", max_tokens=count, temperature=0, extra_body={"ignore_eos": True}
            )
        )
        assert answer.usage is not None
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (count, "length")


def test_a_prompt_that_leaves_room_for_three_tokens_gets_three(mesh: RealMesh) -> None:
    answer = (
        mesh.nodes[0]
        .client()
        .completions.create(model=MODEL, prompt=[5] * 2045, max_tokens=-1, extra_body={"ignore_eos": True})
    )
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_a_stop_string_ends_the_text_wherever_it_begins(mesh: RealMesh) -> None:
    """Six characters from each position: some of them lie over the border of two tokens."""
    for start in range(10, 40, 3):
        stop = EXPECTED_ANSWER[start : start + 6]
        choice = greedy(mesh, start % 3, stop=["never in it", stop]).choices[0]
        assert choice.message.content == EXPECTED_ANSWER[: EXPECTED_ANSWER.index(stop)]
        assert choice.finish_reason == "stop"


def test_an_answer_ends_at_the_models_own_end_unless_that_is_ignored(mesh: RealMesh) -> None:
    ended = greedy(mesh, 0)
    assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == (EXPECTED_ANSWER, "stop")
    endless = greedy(mesh, 1, max_tokens=200, extra_body={"ignore_eos": True})
    assert (endless.usage.completion_tokens, endless.choices[0].finish_reason) == (200, "length")
    assert endless.choices[0].message.content.startswith(EXPECTED_ANSWER)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_wild_text_is_whole_characters_and_streamed_alike(mesh: RealMesh, seed: int) -> None:
    """At temperature 5 tokens are drawn from everywhere, parts of characters among them."""
    fields: Any = {"model": MODEL, "prompt": "A", "max_tokens": 150, "temperature": 5, "seed": seed}
    whole = mesh.nodes[0].client().completions.create(**fields, extra_body={"ignore_eos": True})
    stream = mesh.nodes[2].client().completions.create(**fields, stream=True, extra_body={"ignore_eos": True})
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    assert whole.choices[0].text


def test_a_token_that_is_forbidden_or_forced_obeys_its_bias(mesh: RealMesh) -> None:
    def first(node: int, **fields: Any) -> str:
        answer = (
            mesh.nodes[node]
            .client()
            .completions.create(model=MODEL, prompt="A stage is a", max_tokens=1, temperature=0, logprobs=1, **fields)
        )
        return answer.choices[0].text

    usual = first(0)
    url = f"{mesh.nodes[1].url}/tokenize"
    token = httpx.post(url, json={"content": usual}, timeout=WAIT_S).json()["tokens"][0]
    assert first(1, logit_bias={str(token): -100}) != usual
    other = httpx.post(url, json={"content": "z"}, timeout=WAIT_S).json()["tokens"][0]
    assert first(2, logit_bias={str(other): 100}) == "z"
