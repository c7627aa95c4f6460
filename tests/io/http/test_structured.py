"""Answers of a demanded form over all routes: what the head is asked for, and how forced calls are told."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pydantic
import pytest

from meshnode.wire.sampling import CONSTRAINED_TOKENS, GRAMMAR_BYTES
from tests.io.http.byte_model import VOCABULARY, ByteDirectory, ByteModel
from tests.io.http.serving import events, serving
from tests.io.http.test_messages import named_events
from tests.io.http.test_openai_client import MODEL, client_of

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")

MESSAGES: Any = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS: Any = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("add", "sub")]
CALLS = [
    '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
    '<tool_call>\n{"name": "sub", "arguments": {"a":25}}\n</tool_call>',
]
REQUIRED = {"tools": TOOLS, "tool_choice": "required"}


def caller(answer: str = "\n".join(CALLS), template: str = "{{ tools }}<tool_call>") -> ByteModel:
    model = ByteModel(answer)
    model.context = 4096
    model.vocabulary = msgspec.structs.replace(VOCABULARY, chat_template=template)
    return model


async def post(model: ByteModel, path: str = "chat/completions", **fields: Any) -> httpx.Response:
    async with serving(ByteDirectory(model)) as server, server.client() as client:
        return await client.post(f"/v1/{path}", json=fields)


async def chat(model: ByteModel, **fields: Any) -> httpx.Response:
    return await post(model, messages=MESSAGES, **fields)


def grammars(model: ByteModel) -> list[str]:
    return [generation.sampling.grammar for generation in model.seen]


def format_of(schema: Any, strict: bool | None = True) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}


async def test_without_a_demand_nothing_is_checked_and_nothing_asked_of_the_sampler() -> None:
    model = caller("hi")
    for fields in ({}, {"response_format": {"type": "text"}}, {"tools": TOOLS}, {"grammar": ""}):
        assert (await chat(model, **fields)).status_code == 200
    assert (model.grammars, set(grammars(model))) == ([], {""})


@pytest.mark.parametrize(
    ("fields", "inside"),
    [
        ({"response_format": {"type": "json_object"}}, '"type": "object"'),
        ({"response_format": {"type": "json_object", "schema": {"const": "inner"}}}, '"const": "inner"'),
        ({"response_format": format_of({"const": "named"})}, '"const": "named"'),
        ({"json_schema": {"const": "field"}}, '"const": "field"'),
        ({"grammar": 'root ::= "x"'}, 'gbnf: root ::= "x"'),
        (REQUIRED, '"add'),
        ({"tools": [{"function": {**TOOLS[0]["function"], "strict": True}}]}, "head[lazy]"),
    ],
)
async def test_every_choice_keeps_to_what_was_demanded(fields: dict[str, Any], inside: str) -> None:
    model = caller()
    assert (await chat(model, n=2, **fields)).status_code == 200
    assert len(grammars(model)) == 2
    assert all(inside in grammar for grammar in grammars(model))
    assert all(generation.max_tokens <= CONSTRAINED_TOKENS for generation in model.seen)


async def test_completions_take_llama_cpps_two_fields() -> None:
    model = caller("x")
    for fields in ({"grammar": 'root ::= "x"'}, {"json_schema": {"const": "x"}}):
        assert (await post(model, "completions", prompt=["a", "b"], **fields)).status_code == 200
    assert [grammar[:5] for grammar in grammars(model)] == ["gbnf:"] * 2 + ["start"] * 2


async def test_a_schema_that_is_not_strict_is_relaxed_and_the_answer_says_so() -> None:
    model = caller("{}")
    model.refuses = '"lenient": false'
    for stream in (False, True):
        response = await chat(model, stream=stream, response_format=format_of({}, strict=None))
        assert (response.status_code, response.headers["x-meshnode-schema"]) == (200, "relaxed")
    assert '"lenient": true' in grammars(model)[0]
    refused = await chat(model, response_format=format_of({}))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")
    model.refuses = ""
    assert "x-meshnode-schema" not in (await chat(model, response_format=format_of({}, strict=None))).headers


@pytest.mark.parametrize(
    ("path", "field"),
    [("chat/completions", "response_format"), ("chat/completions", "tools"), ("completions", "json_schema")],
)
async def test_a_schema_that_is_too_large_is_not_even_looked_into(path: str, field: str) -> None:
    schema = {"type": "object", "oneOf": [{}, {}], "description": "x" * GRAMMAR_BYTES}
    asked: dict[str, Any] = {
        "response_format": {"response_format": format_of(schema), "messages": MESSAGES},
        "tools": {
            "tools": [{"function": {"name": "add", "parameters": schema}}],
            "tool_choice": "required",
            "messages": MESSAGES,
        },
        "json_schema": {"json_schema": schema, "prompt": "a"},
    }[field]
    refused = await post(caller(), path, **asked)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
    assert "at most 65536 bytes" in refused.json()["error"]["message"]


async def test_forced_calls_are_the_message_whole_and_streamed() -> None:
    model = caller()
    choice = (await chat(model, **REQUIRED)).json()["choices"][0]
    message = choice["message"]
    assert (choice["finish_reason"], message["content"]) == ("tool_calls", None)
    whole = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    assert whole == [("add", '{"a": 1}'), ("sub", '{"a":25}')]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    parts = [
        part
        for event in events((await chat(model, stream=True, **REQUIRED)).text)[:-1]
        for part in event["choices"][0]["delta"].get("tool_calls", [])
    ]
    begun = [part for part in parts if "id" in part]
    assert [(part["index"], part["type"], part["function"]["arguments"]) for part in begun] == [
        (0, "function", ""),
        (1, "function", ""),
    ]
    for index, (name, arguments) in enumerate(whole):
        pieces = [part["function"]["arguments"] for part in parts if part["index"] == index]
        assert "".join(pieces) == arguments
        assert len(pieces) > 5, "they come while they are written"
        assert begun[index]["function"]["name"] == name


async def test_a_forced_call_that_max_tokens_cuts_off_says_length() -> None:
    body: dict[str, Any] = {**REQUIRED, "max_tokens": CALLS[0].index("1")}
    for stream in (False, True):
        response = await chat(caller(), stream=stream, **body)
        if stream:
            parts = [event["choices"][0] for event in events(response.text)[:-1]]
            pieces = [part["delta"]["tool_calls"][0]["function"] for part in parts if part["delta"].get("tool_calls")]
            assert parts[-1]["finish_reason"] == "length"
            assert "".join(piece["arguments"] for piece in pieces) == '{"a": '
        else:
            choice = response.json()["choices"][0]
            assert choice["finish_reason"] == "length"
            assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": '


async def test_a_named_tool_is_the_only_one_and_the_model_is_told_of_all() -> None:
    model = caller(CALLS[1])
    named = {"type": "function", "function": {"name": "sub"}}
    message = (await chat(model, tools=TOOLS, tool_choice=named)).json()["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["sub"]
    assert "sub" in grammars(model)[0]
    assert "add" not in grammars(model)[0]
    assert len(model.conversations[0].variables["tools"]) == 2


@pytest.mark.parametrize(("parallel", "several"), [(None, True), (True, True), (False, False)])
async def test_parallel_calls_are_forced_or_not(parallel: bool | None, several: bool) -> None:
    model = caller()
    await chat(model, parallel_tool_calls=parallel, **REQUIRED)
    assert ("{0,63}" in grammars(model)[0]) is several


async def test_a_thought_before_a_forced_call_is_told_from_it() -> None:
    model = caller(f"Hm.</think>\n\n{CALLS[0]}", "{{ tools }}<tool_call></think>")

    async def render(conversation: Any) -> str:
        return "assistant:<think>"

    model.render = render  # type: ignore[method-assign]
    message = (await chat(model, reasoning_format="none", **REQUIRED)).json()["choices"][0]["message"]
    assert message["reasoning_content"] == "Hm."
    assert message["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert "thought[lazy]" in grammars(model)[0]


async def test_a_template_that_writes_bare_json_is_forced_in_it() -> None:
    model = caller('{"name": "add", "parameters": {"a": 3}}', '{{ tools }} Respond as {"name": ..., "parameters": ...}')
    message = (await chat(model, **REQUIRED)).json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 3}'}


async def test_the_official_client_accumulates_forced_calls_and_parses_answers() -> None:
    answer = pydantic.create_model("Answer", name=(str, ...), size=(int, ...))
    async with (
        client_of(caller()) as client,
        client.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice="required") as stream,
    ):
        final = await stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("add", '{"a": 1}'),
        ("sub", '{"a":25}'),
    ]
    model = caller('{"name": "x","size": 3}')
    async with client_of(model) as client:
        parsed = await client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=answer)
    assert parsed.choices[0].message.parsed == answer(name="x", size=3)
    assert '"additionalProperties": false' in grammars(model)[0]


async def test_responses_force_calls_and_shapes() -> None:
    tools = [{"type": "function", "name": "add", "parameters": PARAMETERS, "strict": True}]
    body: dict[str, Any] = {"input": "hi", "tools": tools, "tool_choice": {"type": "function", "name": "add"}}
    whole = (await post(caller(CALLS[0]), "responses", **body)).json()
    assert [(item["type"], item["name"], item["arguments"]) for item in whole["output"]] == [
        ("function_call", "add", '{"a": 1}')
    ]
    shape = {"type": "json_schema", "name": "x", "schema": {"const": 1}, "strict": True}
    model = caller("1")
    answered = (await post(model, "responses", input="hi", text={"format": shape})).json()
    assert answered["output"][0]["content"][0]["text"] == "1"
    assert answered["text"]["format"]["schema"] == {"const": 1}
    assert '"const": 1' in grammars(model)[0]
    model.refuses = "const"
    refused = await post(model, "responses", input="hi", text={"format": shape})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "text.format")


async def test_messages_force_calls() -> None:
    tools = [{"name": "add", "input_schema": PARAMETERS}, {"name": "sub", "input_schema": PARAMETERS}]
    body: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 400, "tools": tools}
    whole = (await post(caller(), "messages", **body, tool_choice={"type": "any"})).json()
    assert [(block["name"], block["input"]) for block in whole["content"]] == [("add", {"a": 1}), ("sub", {"a": 25})]
    assert whole["stop_reason"] == "tool_use"
    model = caller(CALLS[1])
    named = {"type": "tool", "name": "sub"}
    streamed = named_events((await post(model, "messages", **body, stream=True, tool_choice=named)).text)
    deltas = [event["delta"] for event in streamed if event["type"] == "content_block_delta"]
    assert json.loads("".join(delta["partial_json"] for delta in deltas)) == {"a": 25}
    assert "add" not in grammars(model)[0]
