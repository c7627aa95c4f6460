"""Prompts that come back with the log-probabilities of their own tokens."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from meshnode.io.http import generation, shapes
from meshnode.io.http.echo import echo_of
from tests.io.http.byte_model import BOS, END, VOCABULARY, ByteDirectory, ByteModel
from tests.io.http.serving import events, serving


async def scored(model: ByteModel, **fields: Any) -> httpx.Response:
    body = {"max_tokens": 1, "logprobs": 1, "echo": True, **fields}
    async with serving(ByteDirectory(model)) as server, server.client() as client:
        return await client.post("/v1/completions", json=body)


async def test_a_scored_prompt_has_an_entry_for_each_of_its_tokens_and_then_for_each_generated_one() -> None:
    model = ByteModel("xyz")
    answer = (await scored(model, prompt=[97, 98, 99], logprobs=2, max_tokens=2)).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abcxy", "length")
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c", "x", "y"],
        "token_logprobs": [None, -1.0, -2.0, -0.5, -0.5],
        "top_logprobs": [None, {"c": -0.5, "b": -1.5}, {"d": -1.5, "c": -2.5}, {"x": -0.5, "y": -1.5},
                         {"y": -0.5, "z": -1.5}],
        "text_offset": [0, 1, 2, 3, 4],
    }  # fmt: skip
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 2)
    assert model.seen[0].scored


async def test_a_request_of_the_evaluation_harness_finds_its_continuation_between_context_and_last_token() -> None:
    """lm-eval reads [context length : -1], also where the model would stop right behind the continuation."""
    for answer in ("x", ""):
        choice = (await scored(ByteModel(answer), prompt=[[97, 98, 99, 100]], temperature=0, seed=1234)).json()
        found = choice["choices"][0]["logprobs"]
        assert found["token_logprobs"][2:-1] == [-2.0, -3.0]
        assert [max(top.values()) for top in found["top_logprobs"][2:-1]] == [-1.5, -2.5]


async def test_the_token_that_ended_the_answer_is_told_and_is_no_text() -> None:
    choice = (await scored(ByteModel("x"), prompt="a", max_tokens=9)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ax", "stop")
    assert choice["logprobs"]["tokens"] == ["<|bos|>", "a", "x", "<|end|>"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]


@pytest.mark.parametrize("logprobs", [None, 0, 1])
async def test_with_echo_no_token_at_all_may_be_asked_for(logprobs: int | None) -> None:
    answer = (await scored(ByteModel("xyz"), prompt=["ab", [99]], max_tokens=0, logprobs=logprobs)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "c"]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 0
    told = [choice["logprobs"] and choice["logprobs"]["token_logprobs"] for choice in answer["choices"]]
    assert told == ([None, None] if logprobs is None else [[None, -1.0, -2.0], [None]])


async def test_without_echo_a_token_must_be_asked_for() -> None:
    response = await scored(ByteModel(), prompt="a", max_tokens=0, echo=False)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")


async def test_prompts_and_choices_have_their_own_scores_in_order() -> None:
    answer = (await scored(ByteModel("x"), prompt=["a", "bc"], n=2, max_tokens=1)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["logprobs"]["tokens"] for choice in answer["choices"]] == [
        *[["<|bos|>", "a", "x"]] * 2,
        *[["<|bos|>", "b", "c", "x"]] * 2,
    ]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
async def test_a_stream_adds_up_to_the_whole_answer_in_pieces(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "PIECE_TOKENS", 3)
    asked = {"prompt": [[97, 0xC3, 0xA9, 99, 100, 101, 102, 103, 104][:length]], "max_tokens": 4}
    whole = (await scored(ByteModel("xyé"), **asked)).json()["choices"][0]
    *chunks, done = events((await scored(ByteModel("xyé"), **asked, stream=True)).text)
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks if isinstance(chunk, dict)]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for part, values in whole["logprobs"].items():
        assert [value for choice in choices for value in choice["logprobs"][part]] == values
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    assert max(len(choice["logprobs"]["tokens"]) for choice in choices) <= 3


async def test_of_two_tokens_with_one_text_the_likelier_is_told() -> None:
    model = ByteModel("x")
    pieces = list(VOCABULARY.pieces)
    pieces[ord("c")] = pieces[ord("b")] = b"same"
    model.vocabulary = type(VOCABULARY)(tuple(pieces), VOCABULARY.markers, VOCABULARY.end)
    found = (await scored(model, prompt=[97, 98], logprobs=2)).json()["choices"][0]["logprobs"]
    assert found["top_logprobs"][1] == {"same": -0.5}


async def test_more_scores_than_one_answer_holds_are_refused_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SCORES", 20)
    model = ByteModel("x")
    assert (await scored(model, prompt=[[97] * 5] * 2, logprobs=1)).status_code == 200
    response = await scored(model, prompt=[[97] * 5] * 2, logprobs=2)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "logprobs")
    assert "30" in error["message"]
    assert "20" in error["message"]


def test_control_tokens_are_written_out_but_for_the_one_that_the_model_adds() -> None:
    echo = echo_of(VOCABULARY, (BOS, 97, BOS, 0xC3, 0xA9, END, 0xC3))
    assert echo.text == "a<|bos|>é<|end|>\ufffd"
    assert echo.offsets == (0, 0, 1, 8, 8, 9, 16)
    assert echo_of(VOCABULARY, (END,)).text == "<|end|>"


async def test_a_prompt_beyond_the_context_is_refused_before_it_is_written() -> None:
    model = ByteModel()
    for fields in ({"logprobs": None}, {"max_tokens": 0}):
        response = await scored(model, prompt=[[97] * 600, [98]], **fields)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert model.seen == []
