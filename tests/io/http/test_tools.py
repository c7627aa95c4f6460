"""Tool calls over all three routes, by a model whose template teaches Hermes' format."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest

from tests.io.http.byte_model import END, VOCABULARY, ByteDirectory, ByteModel
from tests.io.http.mesh import TwoNodes
from tests.io.http.serving import events, serving
from tests.io.http.test_messages import named_events, rebuilt
from tests.io.http.test_openai_client import MODEL, client_of

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")

TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
MESSAGES: Any = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>'
ARGUMENTS = '{"a": 1, "b": "é"}'


def caller(answer: str = f"Let me add.\n{CALL}\n{CALL}", template: str = "{{ tools }}<tool_call></think>") -> ByteModel:
    model = ByteModel(answer)
    model.context = 4096
    model.vocabulary = msgspec.structs.replace(VOCABULARY, chat_template=template)
    return model


async def chat(model: ByteModel, **fields: Any) -> httpx.Response:
    async with serving(ByteDirectory(model)) as server, server.client() as client:
        return await client.post("/v1/chat/completions", json={"messages": MESSAGES, "tools": TOOLS, **fields})


async def test_calls_are_told_from_text_and_end_the_answer() -> None:
    choice = (await chat(caller())).json()["choices"][0]
    message = choice["message"]
    assert (choice["finish_reason"], message["content"]) == ("tool_calls", "Let me add.")
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "add", "arguments": ARGUMENTS}] * 2
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(name.startswith("call_") for name in ids)


async def test_only_calls_leave_no_content() -> None:
    assert (await chat(caller(CALL))).json()["choices"][0]["message"]["content"] is None


async def test_streamed_calls_add_up_to_the_same_message() -> None:
    model = caller(f"<think>Two numbers.</think>Let me add.\n{CALL}\n{CALL}")
    whole = (await chat(model)).json()["choices"][0]["message"]
    made: dict[int, dict[str, Any]] = {}
    text, finish = "", None
    for event in events((await chat(model, stream=True)).text)[:-1]:
        choice = event["choices"][0]
        text += choice["delta"].get("content") or ""
        finish = choice["finish_reason"] or finish
        for part in choice["delta"].get("tool_calls", []):
            call = made.setdefault(part["index"], {"id": part.get("id"), "type": part.get("type"), "function": {}})
            call["function"].setdefault("name", part["function"].get("name"))
            call["function"]["arguments"] = call["function"].get("arguments", "") + part["function"]["arguments"]
    assert (text, finish, whole["reasoning_content"]) == (whole["content"], "tool_calls", "Two numbers.")
    assert [call["function"] for call in made.values()] == [call["function"] for call in whole["tool_calls"]]


async def test_the_official_client_accumulates_streamed_calls() -> None:
    async with (
        client_of(caller(CALL)) as client,
        client.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=TOOLS) as stream,
    ):
        final = await stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [("add", ARGUMENTS)]


async def test_without_parallel_calls_the_answer_ends_with_the_first_one() -> None:
    model = caller()
    choice = (await chat(model, parallel_tool_calls=False)).json()["choices"][0]
    assert (choice["finish_reason"], len(choice["message"]["tool_calls"])) == ("tool_calls", 1)
    assert model.lanes == 0


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": []}])
async def test_where_no_tool_may_be_called_everything_is_text(fields: dict[str, Any]) -> None:
    choice = (await chat(caller(CALL), **fields)).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", CALL)


async def test_a_call_that_max_tokens_cuts_off_is_not_made() -> None:
    choice = (await chat(caller(CALL), max_tokens=30)).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", CALL[:30])
    assert "tool_calls" not in choice["message"]


async def test_control_tokens_that_begin_a_call_are_seen_though_answers_hide_them() -> None:
    model = caller(template="{{ tools }}[TOOL_CALLS]")
    pieces = (*VOCABULARY.pieces[:258], b"", b"")
    markers = {**VOCABULARY.markers, 258: b"[TOOL_CALLS]", 259: b"[ARGS]"}
    model.vocabulary = msgspec.structs.replace(model.vocabulary, pieces=pieces, markers=markers)
    model.answer = [258, *b"add", 259, *b"{}", END]
    message = (await chat(model)).json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": "{}"}


async def test_responses_give_calls_as_items_and_take_their_results() -> None:
    tools: Any = [{"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}]
    model = caller(f"Let me add.\n{CALL}")
    async with client_of(model) as client:
        whole = await client.responses.create(model=MODEL, input="hi", tools=tools)
        async with client.responses.stream(model=MODEL, input="hi", tools=tools) as stream:
            streamed = await stream.get_final_response()
        for answer in (whole, streamed):
            assert [item.type for item in answer.output] == ["message", "function_call"]
            assert (answer.output[1].name, answer.output[1].arguments) == ("add", ARGUMENTS)
        given: Any = [
            {"role": "user", "content": "hi"},
            *[item.model_dump(exclude_none=True) for item in whole.output],
            {"type": "function_call_output", "call_id": whole.output[1].call_id, "output": "3"},
        ]
        await client.responses.create(model=MODEL, input=given, tools=tools)
    last = model.conversations[-1]
    assert [turn["role"] for turn in last.messages] == ["user", "assistant", "tool"]
    assert last.messages[1]["content"] == "Let me add."
    assert last.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": json.loads(ARGUMENTS)}
    assert last.messages[2] == {"role": "tool", "content": "3", "tool_call_id": whole.output[1].call_id}
    assert last.variables["tools"][0]["function"]["name"] == "add"


async def test_messages_give_calls_as_blocks_and_take_their_results() -> None:
    model = caller(f"Let me add.\n{CALL}")
    tools = [{"name": "add", "input_schema": {"type": "object"}}]
    body = {"max_tokens": 500, "messages": MESSAGES, "tools": tools}
    async with serving(ByteDirectory(model)) as server, server.client() as client:
        whole = (await client.post("/v1/messages", json=body)).json()
        streamed = rebuilt(named_events((await client.post("/v1/messages", json={**body, "stream": True})).text))
        results = [
            {
                "type": "tool_result",
                "tool_use_id": whole["content"][1]["id"],
                "content": [{"type": "text", "text": "3"}],
            },
            {"type": "text", "text": "and then?"},
        ]
        turns = [*MESSAGES, {"role": "assistant", "content": whole["content"]}, {"role": "user", "content": results}]
        assert (await client.post("/v1/messages", json={**body, "messages": turns})).status_code == 200
    for answer in (whole, streamed):
        assert answer["stop_reason"] == "tool_use"
        assert [block["type"] for block in answer["content"]] == ["text", "tool_use"]
        assert (answer["content"][1]["name"], answer["content"][1]["input"]) == ("add", json.loads(ARGUMENTS))
    roles = [turn["role"] for turn in model.conversations[-1].messages]
    assert roles == ["user", "assistant", "tool", "user"]


async def test_a_node_without_the_head_gives_the_same_calls() -> None:
    mesh = TwoNodes(caller(CALL))
    async with serving(mesh.joiner) as server, server.client() as client:
        body = {"model": mesh.model.id, "messages": MESSAGES, "tools": TOOLS}
        choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
