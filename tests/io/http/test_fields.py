from __future__ import annotations

from typing import Any

import msgspec
import pytest

from meshnode.errors import InvalidRequest
from meshnode.io.http.body import decode
from meshnode.io.http.fields import BEST_ONLY, NEVER, ChatRequest, CompletionRequest
from meshnode.io.http.turns import Function, Tool
from tests.io.http.byte_model import ByteDirectory, ByteModel
from tests.io.http.serving import serving

HELLO = {"messages": [{"role": "user", "content": "hi"}]}


def schema_of(schema, strict=True):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}


def named(name):
    return {"type": "function", "function": {"name": name}}


WRONG = [
    ("chat", {"messages": "hi"}, "messages"),
    ("chat", {"messages": []}, "messages"),
    ("chat", {}, "messages"),
    ("chat", {"messages": [{"content": "hi"}]}, "messages[0].role"),
    ("chat", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "", "content": "x"}]}, "messages[0].role"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ("chat", {**HELLO, "model": 5}, "model"),
    ("chat", {**HELLO, "temperature": "warm"}, "temperature"),
    ("chat", {**HELLO, "temperature": -1}, "temperature"),
    ("chat", {**HELLO, "top_p": -0.1}, "top_p"),
    ("chat", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("chat", {**HELLO, "max_tokens": 0}, "max_tokens"),
    ("chat", {**HELLO, "max_completion_tokens": -5}, "max_completion_tokens"),
    ("chat", {**HELLO, "max_tokens": 1.5}, "max_tokens"),
    ("chat", {**HELLO, "n": 0}, "n"),
    ("chat", {**HELLO, "n": 1000}, "n"),
    ("chat", {**HELLO, "stop": [1]}, "stop[0]"),
    ("chat", {**HELLO, "stop": ["x"] * 17}, "stop"),
    ("chat", {**HELLO, "top_logprobs": 3}, "top_logprobs"),
    ("chat", {**HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("chat", {**HELLO, "logit_bias": {"word": 1}}, "logit_bias"),
    ("chat", {**HELLO, "logit_bias": {"-1": 1}}, "logit_bias"),
    ("chat", {**HELLO, "logit_bias": [[999, 1.0]]}, "logit_bias"),
    ("chat", {**HELLO, "logit_bias": {"5": True}}, "logit_bias"),
    ("chat", {**HELLO, "logit_bias": [["word", 1.0]]}, "logit_bias[0][0]"),
    ("chat", {**HELLO, "logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
    ("chat", {**HELLO, "repeat_last_n": -5}, "repeat_last_n"),
    ("chat", {**HELLO, "tools": [{"type": "function"}]}, "tools[0].function"),
    ("chat", {**HELLO, "tools": [{"type": "web", "function": {"name": "f"}}]}, "tools[0].type"),
    ("chat", {**HELLO, "tools": [{"function": {"name": "two words"}}]}, "tools[0].function.name"),
    ("chat", {**HELLO, "tools": [{"function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
    ("chat", {**HELLO, "tools": [{"function": {"name": "f"}}] * 129}, "tools"),
    ("chat", {**HELLO, "tools": [{"function": {"name": "f"}}]}, "tools"),
    ("chat", {**HELLO, "tools": [{"function": {"name": "f"}}], "tool_choice": "required"}, "tools"),
    ("chat", {**HELLO, "tools": [{"function": {"name": "f"}}], "tool_choice": "always"}, "tool_choice"),
    ("chat", {**HELLO, "tool_choice": "required"}, "tool_choice"),
    ("chat", {**HELLO, "tools": [{"function": {"name": "f"}}], "tool_choice": named("g")}, "tool_choice"),
    ("chat", {**HELLO, "functions": [{"name": "f"}]}, "functions"),
    ("chat", {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls[0].function"),
    ("chat", {**HELLO, "response_format": {"type": "xml"}}, "response_format"),
    ("chat", {**HELLO, "response_format": {"type": "json_schema"}}, "response_format"),
    ("chat", {**HELLO, "response_format": schema_of(5)}, "response_format"),
    ("chat", {**HELLO, "response_format": schema_of({"x": "y" * 70_000})}, "response_format"),
    ("chat", {**HELLO, "response_format": schema_of({"minProperties": 2})}, "response_format"),
    ("chat", {**HELLO, "response_format": schema_of({"refused": 1})}, "response_format"),
    ("chat", {**HELLO, "response_format": schema_of({}), "json_schema": {}}, "json_schema"),
    ("chat", {**HELLO, "response_format": schema_of({}), "grammar": "root ::= x"}, "grammar"),
    ("chat", {**HELLO, "response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ("chat", {**HELLO, "json_schema": {"refused": 1}}, "json_schema"),
    ("chat", {**HELLO, "grammar": "refused"}, "grammar"),
    ("completion", {"prompt": "a", "grammar": "x", "json_schema": {}}, "grammar"),
    ("completion", {"prompt": "a", "grammar": "refused"}, "grammar"),
    ("completion", {"prompt": "a", "json_schema": {"refused": 1}}, "json_schema"),
    ("completion", {}, "prompt"),
    ("completion", {"prompt": []}, "prompt"),
    ("completion", {"prompt": [1, "a"]}, "prompt"),
    ("completion", {"prompt": [[]]}, "prompt"),
    ("completion", {"prompt": [999]}, "prompt"),
    ("completion", {"prompt": ["a"] * 129}, "prompt"),
    ("completion", {"prompt": "a", "suffix": "b"}, "suffix"),
    ("completion", {"prompt": "a", "best_of": 2}, "best_of"),
    ("completion", {"prompt": "a", "echo": True, "logprobs": 1, "suffix": "b"}, "suffix"),
    ("completion", {"prompt": "a", "echo": True, "logprobs": 21}, "logprobs"),
    ("completion", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ("completion", {"prompt": "a", "max_tokens": -2, "echo": True}, "max_tokens"),
    ("chat", {**HELLO, "max_tokens": 0, "echo": True}, "max_tokens"),
    ("completion", {"prompt": "a", "logprobs": 21}, "logprobs"),
]


async def test_what_cannot_be_is_a_400_that_names_the_field() -> None:
    paths = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
    model = ByteModel()
    model.refuses = "refused"
    async with serving(ByteDirectory(model)) as server, server.client() as client:
        for route, body, field in WRONG:
            response = await client.post(paths[route], json=body)
            error = response.json()["error"]
            seen = (response.status_code, error["type"], error["param"])
            assert seen == (400, "invalid_request_error", field), (body, error)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000, b'{"messages":"\\ud800"}']
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode(body, ChatRequest)


def test_null_means_the_default() -> None:
    names = [name for name in ChatRequest.__struct_fields__ if name != "messages"]
    fields: dict[str, Any] = dict.fromkeys(names)
    asked = decode(msgspec.json.encode({**HELLO, **fields}), ChatRequest)
    assert (asked.choices(), asked.stops(), asked.token_limit(), asked.alternatives()) == (1, (), None, -1)
    assert asked.sampling(-1).temperature == 1.0


@pytest.mark.parametrize(("seed", "expected"), [(5, 5), (-2, 2**64 - 2), (2**64 + 3, 3)])
def test_any_integer_is_a_seed(seed: int, expected: int) -> None:
    assert CompletionRequest(prompt="a", seed=seed).sampling(-1).seed == expected


def test_minus_one_tokens_means_until_the_context_is_full() -> None:
    assert CompletionRequest(prompt="a", max_tokens=-1).token_limit(16) is None


def test_tools_that_may_not_be_called_are_no_reason_to_refuse() -> None:
    ChatRequest(messages=[], tools=[Tool(Function("f"))], tool_choice="none").refuse_unsupported()


@pytest.mark.parametrize("given", [{"5": -100, "7": False}, [[5, -100], [7, False]]])
def test_a_bias_of_false_means_never_in_both_spellings(given: Any) -> None:
    asked = decode(msgspec.json.encode({"prompt": "a", "logit_bias": given}), CompletionRequest)
    assert asked.sampling(-1).logit_bias == ((5, -100.0), (7, NEVER))


def test_a_top_p_of_zero_leaves_the_best_token_alone() -> None:
    assert decode(b'{"prompt":"a","top_p":0}', CompletionRequest).sampling(-1).top_p == BEST_ONLY


def test_a_content_of_null_is_an_empty_one() -> None:
    asked = decode(b'{"messages":[{"role":"user","content":null}]}', ChatRequest)
    assert asked.as_conversation().messages == ({"role": "user", "content": ""},)
