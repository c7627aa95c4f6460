"""Answers that must have a form, from a random model at a high temperature, over one, two and three stages.

Such a model follows nothing but the grammar: what it ends with is what the grammar lets through.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest

from tests.e2e.nodes import WAIT_S, RealMesh, RealNode, until
from tests.factory import models

pytestmark = pytest.mark.e2e

MESSAGES: Any = [{"role": "user", "content": "hi"}]
TEMPLATE = models.CHAT_TEMPLATE + "{% if tools %}<tool_call>{% endif %}"
LETTERS = {"type": "string", "pattern": "^[a-z]{1,6}$"}
SCHEMAS: dict[str, Any] = {
    "record": {
        "type": "object",
        "properties": {"name": LETTERS, "size": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {}},
        "required": ["name", "size"],
        "additionalProperties": False,
    },
    "list": {"type": "array", "items": {"anyOf": [LETTERS, {"type": "boolean"}]}, "minItems": 2, "maxItems": 4},
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "word": {"enum": ["leaf", "branch"]},
                    "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
                },
                "required": ["word", "kids"],
                "additionalProperties": False,
            }
        },
    },
    "any object": {"type": "object"},
    "text": {"type": "string", "minLength": 1, "maxLength": 12},
    "number": {"type": "number", "minimum": -2.5, "maximum": 1000},
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "add", "parameters": SCHEMAS["record"], "strict": True}},
    {"type": "function", "function": {"name": "walk", "parameters": SCHEMAS["tree"], "strict": True}},
]
OF_TOOL = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return models.build(path, layers=6, context=4096, template=TEMPLATE)


@pytest.fixture(scope="module", params=[1, 2, 3])
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[RealNode]:
    """The last node of a mesh with so many stages: its requests are passed on to the head of the first."""
    mesh = RealMesh(tmp_path_factory.mktemp("mesh"))
    stages: int = request.param
    try:
        cuts = ",".join(str(6 * number // stages) for number in range(1, stages))
        mesh.found("one", "--context", "4096", *(("--cuts", cuts) if cuts else ()), model=model)
        for name in ("two", "three")[: stages - 1]:
            mesh.join(name)
        served = until("the model is served", mesh.nodes[0].serving)
        assert len(served["stages"]) == stages
        until("the last node lists it", mesh.nodes[-1].ready)
        yield mesh.nodes[-1]
    finally:
        mesh.close()


def chat(node: RealNode, **fields: Any) -> Any:
    body = {"messages": MESSAGES, "temperature": 2.0, "max_tokens": 300, **fields}
    response = httpx.post(f"{node.url}/v1/chat/completions", json=body, timeout=WAIT_S)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def format_of(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_ends_is_an_instance_and_what_does_not_says_length(node: RealNode, name: str) -> None:
    ended = 0
    for choice in chat(node, n=12, seed=7, response_format=format_of(SCHEMAS[name])):
        assert choice["finish_reason"] in ("stop", "length")
        if choice["finish_reason"] == "stop":
            ended += 1
            jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMAS[name])
    assert ended >= 6


def test_forced_calls_have_arguments_of_their_schemas_whole_and_streamed(node: RealNode) -> None:
    seen: set[str] = set()
    for choice in chat(node, n=8, seed=3, tools=TOOLS, tool_choice="required", parallel_tool_calls=False):
        if choice["finish_reason"] == "length":
            continue
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), OF_TOOL[call["function"]["name"]])
        seen.add(call["function"]["name"])
    assert seen
    named: Any = {"type": "function", "function": {"name": "add"}}
    with node.client().chat.completions.stream(
        model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice=named, temperature=1.5, seed=4
    ) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    calls = final.message.tool_calls or []
    assert [call.function.name for call in calls] == ["add"]
    jsonschema.validate(json.loads(calls[0].function.arguments), OF_TOOL["add"])
    assert calls[0].function.parsed_arguments == json.loads(calls[0].function.arguments)


def test_offered_strict_tools_leave_text_free(node: RealNode) -> None:
    for choice in chat(node, n=4, seed=1, tools=TOOLS, max_tokens=40):
        assert choice["finish_reason"] in ("stop", "length", "tool_calls")


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(node: RealNode) -> None:
    def answer(seed: int) -> str:
        return chat(node, seed=seed, response_format=format_of(SCHEMAS["tree"]))[0]["message"]["content"]

    first = [answer(seed) for seed in range(5)]
    assert [answer(seed) for seed in range(5)] == first
    assert len(set(first)) > 1


def test_the_official_client_parses_what_a_random_model_says(node: RealNode) -> None:
    class Size(pydantic.BaseModel):
        words: list[bool]
        size: int | None

    client = node.client()
    for seed in range(4):
        parsed = client.chat.completions.parse(
            model="tiny", messages=MESSAGES, response_format=Size, temperature=1.5, seed=seed, max_tokens=500
        )
        assert isinstance(parsed.choices[0].message.parsed, Size)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Size, max_tokens=3)


def test_the_other_routes_and_llama_cpps_fields_keep_to_the_same(node: RealNode) -> None:
    spoken = node.client().responses.create(
        model="tiny",
        input="hi",
        text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMAS["list"], "strict": True}},
    )
    jsonschema.validate(json.loads(spoken.output_text), SCHEMAS["list"])
    body = {"prompt": "hi", "max_tokens": 200, "temperature": 2.0, "grammar": 'root ::= ("yes" | "no") " " [0-9]{3}'}
    said = httpx.post(f"{node.url}/v1/completions", json=body, timeout=WAIT_S).json()["choices"][0]
    assert said["finish_reason"] == "stop"
    word, number = said["text"].split(" ")
    assert word in ("yes", "no")
    assert len(number) == 3
    assert number.isdigit()


def test_what_is_not_strict_is_relaxed_and_every_node_says_so(node: RealNode) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "boolean"}, "maxItems": 3}
    body = {"messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}
    body["response_format"]["json_schema"]["schema"] = schema
    response = httpx.post(f"{node.url}/v1/chat/completions", json=body, timeout=WAIT_S)
    assert (response.status_code, response.headers["x-meshnode-schema"]) == (200, "relaxed")
    words = json.loads(response.json()["choices"][0]["message"]["content"])
    assert all(isinstance(word, bool) for word in words)


def test_a_stop_string_still_ends_an_answer(node: RealNode) -> None:
    (choice,) = chat(node, response_format=format_of(SCHEMAS["record"]), stop='"size"')
    assert choice["finish_reason"] == "stop"
    assert '"name"' in choice["message"]["content"]
    assert "size" not in choice["message"]["content"]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "uniqueItems": True},
        {"type": "string", "pattern": "^((a{1000}){1000}){1000}$(?=b)"},
        {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(1500)}},
        {"const": "x" * 70_000},
    ],
    ids=["not enforced", "no pattern", "too complex", "too large"],
)
def test_what_cannot_be_enforced_is_400_and_harms_nobody(node: RealNode, schema: Any) -> None:
    body = {"messages": MESSAGES, "response_format": format_of(schema)}
    refused = httpx.post(f"{node.url}/v1/chat/completions", json=body, timeout=WAIT_S)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format"), refused.text
    (choice,) = chat(node, response_format=format_of({"const": 1}))
    assert choice["message"]["content"] == "1"
