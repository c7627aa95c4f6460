"""Whatever JSON a client sends, the answer is 200 or a 4xx in the envelope: never a 500, never a hang."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.io.http.backend import PassedRequest
from meshnode.io.http.embeddings import EmbeddingsRequest
from meshnode.io.http.endpoint import build_endpoint
from meshnode.io.http.fields import ChatRequest, CompletionRequest
from meshnode.io.http.messages import MessagesRequest
from meshnode.io.http.passing import answer_here
from meshnode.io.http.responses import ResponsesRequest
from meshnode.io.http.tokens import TokenizeRequest
from tests.io.http.byte_model import VOCABULARY, ByteDirectory, ByteModel

NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 20, 2**63, 2**64, -(2**70), 10**400, 0.5, 1e308, -0.0]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=6))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool", ""])}, optional={"content": VALUES})


def bodies(kind: type, prompt: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Few fields at a time: with many, the first wrong one would hide the rest."""
    names = sorted(name for name in kind.__struct_fields__ if name not in prompt)
    given_fields = st.dictionaries(st.sampled_from(names), VALUES, max_size=2)
    return st.builds(lambda fields, base: {**fields, **base}, given_fields, st.fixed_dictionaries(prompt))


async def _status(path: str, body: bytes) -> int:
    model = ByteModel("<think>hm</think>ok <tool_call>{", name="m")
    model.vocabulary = msgspec.structs.replace(VOCABULARY, chat_template="tools <tool_call> </think>", fim=(1, 2, 3))
    endpoint = build_endpoint(ByteDirectory(model))
    request = PassedRequest("POST", path, (("content-type", "application/json"),), body)
    with trio.fail_after(20):
        async with answer_here(endpoint.passed, request) as answer:
            text = b"".join([chunk async for chunk in answer.chunks])
    if answer.status != 200:
        error = json.loads(text)["error"]
        assert error["message"]
        assert {"message", "type", "param", "code"} <= set(error)
    return answer.status


PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "input_text", "thinking", "tool_use", "tool_result", "reasoning_text", "image"])},
    optional={"text": VALUES, "content": VALUES, "input": VALUES, "id": VALUES, "name": VALUES, "tool_use_id": VALUES},
)
CONTENT = st.text(max_size=6) | st.lists(PART, max_size=3) | VALUES
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": CONTENT})
ITEM = st.fixed_dictionaries(
    {"type": st.sampled_from(["message", "reasoning", "function_call", "function_call_output", "item_reference"])},
    optional={"role": st.just("user"), "content": CONTENT, "call_id": VALUES, "name": VALUES, "output": CONTENT},
)
TOOL = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": st.just("f")}, optional={"parameters": VALUES})}
)

POSTS = {
    "chat/completions": bodies(ChatRequest, {"messages": st.lists(MESSAGE, max_size=2)})
    | bodies(ChatRequest, {"messages": st.lists(MESSAGE, max_size=2), "tools": st.lists(TOOL, max_size=2)}),
    "completions": bodies(
        CompletionRequest,
        {"prompt": st.sampled_from(["hi", [1], ["a", "b"], [[1], [2]]]) | st.lists(VALUES, max_size=2)},
    ),
    "responses": bodies(ResponsesRequest, {"input": st.text(max_size=6) | st.lists(ITEM, max_size=3)}),
    "messages": bodies(
        MessagesRequest, {"messages": st.lists(TURN, max_size=3), "max_tokens": st.sampled_from([1, 5, 100])}
    ),
    "tokenize": bodies(TokenizeRequest, {"content": st.text(max_size=9) | VALUES})
    | bodies(TokenizeRequest, {"messages": st.lists(MESSAGE, max_size=2)}),
    "detokenize": st.fixed_dictionaries({"tokens": st.lists(st.integers(-2, 260) | VALUES, max_size=4)}),
    "apply-template": bodies(ChatRequest, {"messages": st.lists(MESSAGE, max_size=2)}),
    "embeddings": bodies(EmbeddingsRequest, {"input": VALUES}),
}
POSTS |= {"responses/input_tokens": POSTS["responses"], "messages/count_tokens": POSTS["messages"]}


@pytest.mark.parametrize("path", POSTS)
def test_anything_is_answered_or_refused(path: str) -> None:
    @settings(max_examples=100, deadline=None)
    @given(POSTS[path])
    def ask(body: dict[str, Any]) -> None:
        assert trio.run(_status, f"/v1/{path}", json.dumps(body).encode()) in {200, 400, 404}

    ask()


@pytest.mark.parametrize("path", POSTS)
def test_any_bytes_are_refused(path: str) -> None:
    @settings(max_examples=30, deadline=None)
    @given(st.binary(max_size=60))
    def ask(body: bytes) -> None:
        assert trio.run(_status, f"/v1/{path}", body) == 400

    ask()
