"""Whatever JSON a client sends, the answer is 200 or a 4xx in the envelope: never a 500, never a hang."""

from __future__ import annotations

import json
from typing import Any

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.io.http.backend import PassedRequest
from meshnode.io.http.endpoint import build_endpoint
from meshnode.io.http.fields import ChatRequest, CompletionRequest
from meshnode.io.http.passing import answer_here
from tests.io.http.byte_model import ByteDirectory, ByteModel

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
    endpoint = build_endpoint(ByteDirectory(ByteModel("ok", name="m")))
    request = PassedRequest("POST", path, (("content-type", "application/json"),), body)
    with trio.fail_after(20):
        async with answer_here(endpoint.passed, request) as answer:
            text = b"".join([chunk async for chunk in answer.chunks])
    if answer.status != 200:
        error = json.loads(text)["error"]
        assert error["message"]
        assert {"message", "type", "param", "code"} <= set(error)
    return answer.status


chats = bodies(ChatRequest, {"messages": st.lists(MESSAGE, max_size=2)})
completions = bodies(
    CompletionRequest, {"prompt": st.sampled_from(["hi", [1], ["a", "b"], [[1], [2]]]) | st.lists(VALUES, max_size=2)}
)


@settings(max_examples=150)
@given(chats)
def test_any_chat_is_answered_or_refused(body: dict[str, Any]) -> None:
    assert trio.run(_status, "/v1/chat/completions", json.dumps(body).encode()) in {200, 400, 404}


@settings(max_examples=150)
@given(completions)
def test_any_completion_is_answered_or_refused(body: dict[str, Any]) -> None:
    assert trio.run(_status, "/v1/completions", json.dumps(body).encode()) in {200, 400, 404}


@settings(max_examples=100)
@given(st.binary(max_size=60))
def test_any_bytes_are_refused(body: bytes) -> None:
    assert trio.run(_status, "/v1/completions", body) == 400
