from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from meshnode.errors import Overloaded, StageLost
from meshnode.io.http.access import Access
from tests.io.http.byte_model import ByteDirectory, ByteModel
from tests.io.http.mesh import TwoNodes
from tests.io.http.serving import serving
from tests.io.http.test_thoughts import thinker

HELLO: dict[str, Any] = {"max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}


async def message(model: ByteModel, path: str = "/v1/messages", **fields: Any) -> httpx.Response:
    async with serving(ByteDirectory(model)) as server, server.client() as client:
        return await client.post(path, json={**HELLO, **fields})


def named_events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each of which is named as its type."""
    found = []
    for event in text.split("\n\n"):
        if event and not event.startswith(":"):
            name, data = event.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


def rebuilt(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream tells, put together as Anthropic's SDK does."""
    assert (events[0]["type"], events[-1]["type"]) == ("message_start", "message_stop")
    made = events[0]["message"]
    for event in events[1:-1]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(made["content"])
                made["content"].append(event["content_block"])
            case "content_block_delta" if event["delta"]["type"] == "input_json_delta":
                assert made["content"][-1]["input"] == {}
                made["content"][-1]["input"] = json.loads(event["delta"]["partial_json"])
            case "content_block_delta":
                assert event["index"] == len(made["content"]) - 1
                kind = event["delta"]["type"].removesuffix("_delta")
                made["content"][-1][kind] += event["delta"][kind]
            case "message_delta":
                made = {**made, **event["delta"], "usage": {**made["usage"], **event["usage"]}}
    assert sum(event["type"] == "content_block_stop" for event in events) == len(made["content"])
    return made


@pytest.mark.parametrize("model", [ByteModel("Hello, wörld."), thinker(), ByteModel("")])
@pytest.mark.parametrize("fields", [{}, {"max_tokens": 3}, {"stop_sequences": ["never", "lo"]}])
async def test_a_streamed_message_adds_up_to_the_whole_one(model: ByteModel, fields: dict[str, Any]) -> None:
    whole = (await message(model, **fields)).json()
    streamed = rebuilt(named_events((await message(model, **fields, stream=True)).text))
    assert {**streamed, "id": None} == {**whole, "id": None}


async def test_a_message_has_the_shape_of_anthropics() -> None:
    answer = (await message(ByteModel("Hello."))).json()
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "org/byte-model")
    assert answer["content"] == [{"type": "text", "text": "Hello."}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    assert answer["usage"]["output_tokens"] == 7


async def test_what_came_out_of_a_cache_is_not_in_the_input_tokens() -> None:
    model = ByteModel("Hello.")
    computed = (await message(model)).json()["usage"]
    model.cached = 5
    usage = (await message(model)).json()["usage"]
    assert (usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]) == (5, 0)
    assert usage["input_tokens"] == computed["input_tokens"] - 5


async def test_the_reason_for_the_end_is_told() -> None:
    cut = (await message(ByteModel("Hello."), max_tokens=2)).json()
    stopped = (await message(ByteModel("Hello."), stop_sequences=["zz", "lo"])).json()
    assert (cut["stop_reason"], cut["content"][0]["text"]) == ("max_tokens", "He")
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "lo")
    assert stopped["content"][0]["text"] == "Hel"


async def test_a_thought_is_a_block_of_its_own() -> None:
    content = (await message(thinker())).json()["content"]
    assert content == [
        {"type": "thinking", "thinking": "Hm, é.", "signature": ""},
        {"type": "text", "text": "Yes."},
    ]


async def test_system_and_blocks_become_the_chat() -> None:
    model = ByteModel()
    turns = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {}}],
        },
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "c"}]},
        {"role": "user", "content": "d"},
    ]
    await message(model, system=[{"type": "text", "text": "short"}], messages=turns, top_k=5, temperature=0.5)
    assert bytes(model.seen[0].prompt[1:]) == b"system: short\nuser: a\nb\nassistant: c\nuser: d\nassistant:"
    assert (model.seen[0].sampling.top_k, model.seen[0].sampling.temperature) == (5, 0.5)


async def test_tokens_can_be_counted_first() -> None:
    model = ByteModel()
    counted = (await message(model, "/v1/messages/count_tokens")).json()
    assert model.seen == []
    assert counted == {"input_tokens": (await message(model)).json()["usage"]["input_tokens"]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content"),
        ({"tools": [{"name": "x"}]}, "tools"),
        ({"tools": [{"name": "x", "type": "web_search_20250305"}]}, "tools[0].type"),
        ({"tools": [{"name": "x"}], "tool_choice": {"type": "any"}}, "tools"),
        ({"tools": [{"name": "x"}], "tool_choice": {"type": "tool", "name": "y"}}, "tool_choice"),
        ({"temperature": 1000}, "temperature"),
        ({"stop_sequences": ["x"] * 17}, "stop"),
    ],
)
async def test_wrong_inputs_are_400_in_anthropics_envelope(fields: dict[str, Any], param: str) -> None:
    response = await message(ByteModel(), **fields)
    body = response.json()
    assert (response.status_code, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert body["error"]["param"] == param


async def test_every_refusal_of_the_route_has_anthropics_envelope() -> None:
    keyed = Access(keys=frozenset({"first"}))
    async with serving(ByteDirectory(ByteModel()), access=keyed) as server, server.client() as client:
        no_key = await client.post("/v1/messages", json=HELLO)
        unknown = await client.post("/messages", json={**HELLO, "model": "x"}, headers={"x-api-key": "first"})
    too_long = await message(ByteModel(), messages=[{"role": "user", "content": "x" * 600}])
    busy = ByteModel()
    busy.fails_with = Overloaded("full")
    full = await message(busy)
    found = [
        (each.status_code, each.json()["type"], each.json()["error"]["type"])
        for each in (no_key, unknown, too_long, full)
    ]
    assert found == [
        (401, "error", "authentication_error"),
        (404, "error", "not_found_error"),
        (400, "error", "invalid_request_error"),
        (429, "error", "rate_limit_error"),
    ]


async def test_an_error_in_a_stream_is_an_event_and_the_end() -> None:
    model = ByteModel()
    model.stall_at, model.fails_with = 2, StageLost("a stage ended")
    last = named_events((await message(model, stream=True)).text)[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error")


async def test_a_node_without_the_head_streams_the_same_and_tells_its_loss_in_the_same_words() -> None:
    mesh = TwoNodes()
    body = {**HELLO, "model": mesh.model.id, "stream": True}
    async with serving(mesh.joiner) as server, server.client() as client:
        assert (
            rebuilt(named_events((await client.post("/v1/messages", json=body)).text))["content"][0]["text"] == "Hello."
        )
        assert (await client.post("/v1/messages/count_tokens", json=HELLO)).json()["input_tokens"] == 20
        mesh.link_breaks_after = 3
        broken = named_events((await client.post("/v1/messages", json=body)).text)
    assert (broken[-1]["type"], broken[-1]["error"]["type"]) == ("error", "overloaded_error")
