from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from tests.io.http.byte_model import BOS, END, VOCABULARY, ByteDirectory, ByteModel
from tests.io.http.serving import events, serving

HELLO = {"messages": [{"role": "user", "content": "hi"}]}
ANSWER = "<think>\nHm, é.\n</think>\n\nYes."


def thinker(answer: str = ANSWER) -> ByteModel:
    model = ByteModel(answer)
    model.vocabulary = msgspec.structs.replace(VOCABULARY, chat_template="{{ x.split('</think>') }}")
    return model


async def chat(model: ByteModel, **fields: Any) -> httpx.Response:
    async with serving(ByteDirectory(model)) as server, server.client() as client:
        return await client.post("/v1/chat/completions", json={**HELLO, **fields})


async def test_a_thought_comes_apart_from_the_answer_and_its_tokens_are_counted() -> None:
    answer = (await chat(thinker())).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm, é.", "Yes.")
    counted = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert len("Hm, é.".encode()) <= counted < len(ANSWER.encode())


async def test_what_is_streamed_adds_up_to_the_whole() -> None:
    found = events((await chat(thinker(), stream=True)).text)[:-1]
    deltas = [event["choices"][0]["delta"] for event in found]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm, é."
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."


@pytest.mark.parametrize("model", [ByteModel(ANSWER), thinker()])
async def test_without_a_template_that_knows_thoughts_or_when_asked_they_are_text(model: ByteModel) -> None:
    wish = {"reasoning_format": "none"} if model.vocabulary.chat_template else {}
    message = (await chat(model, **wish)).json()["choices"][0]["message"]
    assert message["content"] == ANSWER
    assert "reasoning_content" not in message


async def test_an_unknown_reasoning_format_is_400() -> None:
    response = await chat(thinker(), reasoning_format="loud")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "reasoning_format")


async def test_tags_that_are_control_tokens_are_seen_though_answers_hide_them() -> None:
    model = thinker()
    model.vocabulary = msgspec.structs.replace(model.vocabulary, markers={BOS: b"<think>", END + 1: b"</think>"})
    model.vocabulary = msgspec.structs.replace(model.vocabulary, pieces=(*VOCABULARY.pieces[:258], b""))
    model.answer = [BOS, *b"hm", END + 1, *b"Yes.", END]
    message = (await chat(model)).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Yes.")


async def test_a_thought_that_max_tokens_cuts_off_is_no_answer() -> None:
    choice = (await chat(thinker(), max_tokens=11)).json()["choices"][0]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("Hm,", "")
    assert choice["finish_reason"] == "length"
