from __future__ import annotations

import json
from typing import Any

import pytest

from meshnode.errors import TimedOut
from meshnode.io.http import answer, server
from tests.io.http.byte_model import END, HUGE, ByteDirectory, ByteModel
from tests.io.http.serving import events, raw_request, serving

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
STREAMED = {**HELLO, "stream": True}


async def streamed(model: ByteModel, **fields: Any) -> list[Any]:
    async with serving(ByteDirectory(model)) as running, running.client() as client:
        response = await client.post("/v1/chat/completions", json={**STREAMED, **fields})
    assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream")
    return events(response.text)


async def test_a_stream_is_role_then_text_then_finish_then_done() -> None:
    *chunks, done = await streamed(ByteModel("Hey"))
    assert done == "[DONE]"
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""}, {"content": "H"}, {"content": "e"}, {"content": "y"}, {},
    ]  # fmt: skip
    assert [choice["finish_reason"] for choice in choices] == [None] * 4 + ["stop"]
    assert not any("usage" in chunk for chunk in chunks)


async def test_usage_comes_last_and_only_where_asked() -> None:
    *chunks, usage, done = await streamed(ByteModel("Hey"), stream_options={"include_usage": True})
    assert (done, usage["choices"], usage["usage"]["completion_tokens"]) == ("[DONE]", [], 4)
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_r8_a_stop_before_max_tokens_ends_the_stream_with_usage() -> None:
    *_, finish, usage, done = await streamed(
        ByteModel("Hello, world."), stop="wor", max_tokens=100, stream_options={"include_usage": True}
    )
    assert (finish["choices"][0]["finish_reason"], done) == ("stop", "[DONE]")
    assert usage["usage"]["completion_tokens"] == len("Hello, wor")


async def test_r57_a_head_that_waited_too_long_is_a_504_type_event() -> None:
    model = ByteModel()
    model.stall_at, model.fails_with = 1, TimedOut("no token for 30 s")
    *_, last = await streamed(model)
    assert (last["error"]["type"], last["error"]["message"]) == ("timeout_error", "no token for 30 s")


@pytest.mark.parametrize("fields", [{}, {"stop": ["rld"]}, {"max_tokens": 9}, {"logprobs": True}, {"n": 3}])
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
async def test_what_a_stream_adds_up_to_equals_the_whole_answer(route: str, fields: dict[str, Any]) -> None:
    chat = route.startswith("chat")
    body = {"max_tokens": 50, **(HELLO if chat else {"prompt": "hi", "echo": "logprobs" not in fields}), **fields}
    if not chat and "logprobs" in fields:
        body["logprobs"] = 1
    async with serving(ByteDirectory(ByteModel("Hello, wörld ✓."))) as running, running.client() as client:
        whole = (await client.post(f"/v1/{route}", json=body)).json()
        *chunks, _ = events((await client.post(f"/v1/{route}", json={**body, "stream": True})).text)
    for choice in whole["choices"]:
        parts = [part["choices"][0] for part in chunks if part["choices"][0]["index"] == choice["index"]]
        texts = [part["delta"].get("content", "") if chat else part["text"] for part in parts]
        assert "".join(texts) == (choice["message"]["content"] if chat else choice["text"])
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        if "logprobs" in fields:
            key = "content" if chat else "tokens"
            together = [entry for part in parts if part["logprobs"] for entry in part["logprobs"][key]]
            assert together == choice["logprobs"][key]


async def test_comment_pings_while_the_prompt_is_processed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "FIRST_S", 0.0)
    monkeypatch.setattr(answer, "PING_S", 0.01)
    model = ByteModel()
    model.stall_at = 0
    async with serving(ByteDirectory(model)) as running:
        stream = await raw_request(running.port, STREAMED)
        received = b""
        while received.count(b": ping\n\n") < 2:
            received += await stream.receive_some(4096)
        assert b"200" in received.split(b"\r\n")[0]
        assert received.index(b'"role":"assistant"') < received.index(b": ping")
        await stream.aclose()
        await model.freed.wait()


@pytest.mark.parametrize("body", [HELLO, STREAMED], ids=["whole", "streamed"])
@pytest.mark.parametrize("half", [False, True], ids=["closed", "half-closed"])
async def test_r10_r11_a_client_that_leaves_frees_its_lane(body: dict[str, Any], half: bool) -> None:
    model = ByteModel()
    model.stall_at = 3
    async with serving(ByteDirectory(model)) as running:
        stream = await raw_request(running.port, body)
        await model.waiting.wait()
        assert model.lanes == 1
        await (stream.send_eof() if half else stream.aclose())
        await model.freed.wait()
        await stream.aclose()


async def test_r53_a_client_that_leaves_frees_every_choice() -> None:
    model = ByteModel()
    model.stall_at = 0
    async with serving(ByteDirectory(model)) as running:
        stream = await raw_request(running.port, {**HELLO, "n": 9})
        await model.waiting.wait()
        await stream.aclose()
        await model.freed.wait()
        assert len(model.seen) <= answer.GENERATIONS_AT_ONCE


async def test_r11_a_client_that_stops_reading_frees_its_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SEND_S", 0.05)
    model = ByteModel()
    model.answer = [*[HUGE] * 200, END]
    async with serving(ByteDirectory(model)) as running:
        stream = await raw_request(running.port, STREAMED)
        await model.freed.wait()
        await stream.aclose()


async def test_r14_a_lane_is_free_after_every_completion() -> None:
    model = ByteModel("ok")
    async with serving(ByteDirectory(model)) as running, running.client() as client:
        for _ in range(100):
            assert (await client.post("/v1/chat/completions", json=HELLO)).status_code == 200
            assert model.lanes == 0


async def test_r12_shutdown_ends_a_stream_with_a_terminal_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FINISH_S", 0.01)
    model = ByteModel("Hello")
    model.stall_at = 2
    async with serving(ByteDirectory(model)) as running, running.client() as client:
        async with client.stream("POST", "/v1/chat/completions", json=STREAMED) as response:
            await model.waiting.wait()
            running.shutdown.set()
            text = "".join([part async for part in response.aiter_text()])
        await running.ended.wait()
    assert events(text)[-1]["error"]["message"] == "this node is shutting down"
    assert model.lanes == 0


async def test_r12_shutdown_ends_although_a_client_stopped_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FINISH_S", 0.01)
    monkeypatch.setattr(server, "TERMINAL_S", 0.05)
    model = ByteModel()
    model.answer = [*[HUGE] * 200, END]
    async with serving(ByteDirectory(model)) as running:
        stream = await raw_request(running.port, STREAMED)
        assert await stream.receive_some(100)
        running.shutdown.set()
        await running.ended.wait()
        assert model.lanes == 0
        await stream.aclose()


async def test_a_request_that_does_not_stream_is_503_at_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FINISH_S", 0.01)
    model = ByteModel()
    model.stall_at = 0
    async with serving(ByteDirectory(model)) as running:
        stream = await raw_request(running.port, HELLO)
        await model.waiting.wait()
        running.shutdown.set()
        async with stream:
            received = b"".join([part async for part in stream])
    head, _, body = received.partition(b"\r\n\r\n")
    assert b" 503 " in head.split(b"\r\n")[0]
    assert json.loads(body)["error"]["type"] == "unavailable_error"


async def test_an_answer_that_is_nearly_done_is_finished_at_shutdown() -> None:
    model = ByteModel("Hello")
    model.hold_at = 2
    async with serving(ByteDirectory(model)) as running:
        stream = await raw_request(running.port, STREAMED)
        await model.waiting.wait()
        running.shutdown.set()
        model.go_on.set()
        async with stream:
            received = b"".join([part async for part in stream])
        await running.ended.wait()
    assert b"data: [DONE]" in received
