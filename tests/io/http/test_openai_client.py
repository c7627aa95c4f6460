"""The official client against the endpoint: what breaks it breaks everybody."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from meshnode.errors import Overloaded
from tests.io.http.byte_model import ByteDirectory, ByteModel
from tests.io.http.serving import serving

# The client drops the generators of its own event parser; outside asyncio nobody closes them for it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")

MODEL = "org/byte-model"
MESSAGES: Any = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def client_of(model: ByteModel) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(ByteDirectory(model)) as running,
        openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        yield client


async def test_models_can_be_listed_and_retrieved() -> None:
    async with client_of(ByteModel()) as client:
        listed = [model.id async for model in client.models.list()]
        one = await client.models.retrieve(MODEL)
    assert (listed, one.id) == ([MODEL], MODEL)


async def test_a_chat_streams_and_does_not_stream() -> None:
    async with client_of(ByteModel("Hello, wörld.")) as client:
        whole = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=40)
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert whole.choices[0].message.content == "Hello, wörld."
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello, wörld."
    assert chunks[-1].usage == whole.usage


async def test_the_stream_helper_accumulates_the_answer() -> None:
    async with (
        client_of(ByteModel("Hello.")) as client,
        client.chat.completions.stream(model=MODEL, messages=MESSAGES, logprobs=True) as stream,
    ):
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello."
    assert [entry.token for entry in final.choices[0].logprobs.content] == list("Hello.")


async def test_completions_with_logprobs_and_echo() -> None:
    async with client_of(ByteModel("two")) as client:
        answer = await client.completions.create(model=MODEL, prompt=["one ", "1 "], echo=True, n=2)
        scored = await client.completions.create(model=MODEL, prompt=[[97]], logprobs=2, max_tokens=2)
    assert [choice.text for choice in answer.choices] == ["one two", "one two", "1 two", "1 two"]
    assert scored.choices[0].logprobs.token_logprobs == [-0.5, -0.5]


async def test_errors_are_the_clients_own_types() -> None:
    model = ByteModel()
    async with client_of(model) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model="other", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)
        model.fails_with = Overloaded("all lanes are busy and the queue is full")
        with pytest.raises(openai.RateLimitError) as full:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        model.stall_at = 1
        with pytest.raises(openai.APIError) as late:
            async for _ in await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True):
                pass
    assert (unknown.value.code, wrong.value.param) == ("model_not_found", "temperature")
    assert (full.value.code, full.value.response.headers["retry-after"]) == ("rate_limit_exceeded", "1")
    assert late.value.type == "rate_limit_error"


async def test_closing_a_stream_frees_the_lane() -> None:
    model = ByteModel()
    model.stall_at = 3
    async with client_of(model) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        await model.waiting.wait()
        await stream.close()
        await model.freed.wait()
