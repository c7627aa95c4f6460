from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio

from meshnode.errors import LinkLost, StageLost
from meshnode.io.http import server
from meshnode.io.http.access import Access
from meshnode.io.http.backend import PassedAnswer, PassedRequest
from meshnode.io.http.endpoint import build_endpoint
from meshnode.io.http.passing import answer_here
from tests.io.http.byte_model import ByteDirectory, ByteModel
from tests.io.http.mesh import TwoNodes
from tests.io.http.serving import events, raw_request, serving

HELLO: dict[str, Any] = {"model": "org/byte-model", "messages": [{"role": "user", "content": "hi"}]}
STREAMED = {**HELLO, "stream": True}


@pytest.mark.parametrize("body", [HELLO, STREAMED])
async def test_a_joiner_gives_the_answer_of_the_head(body: dict[str, Any]) -> None:
    mesh = TwoNodes()
    async with serving(mesh.joiner) as running, running.client() as client:
        headers = {"authorization": "Bearer key", "x-api-key": "key", "cookie": "a=b"}
        response = await client.post("/v1/chat/completions", json=body, headers=headers)
    assert (response.status_code, "Hello." in response.text or '"o"' in response.text) == (200, True)
    assert {name for name, _ in mesh.requests[0].headers} <= {"content-type", "accept"}
    if body is STREAMED:
        assert events(response.text)[-1] == "[DONE]"


async def test_status_and_retry_headers_of_the_head_come_back() -> None:
    mesh = TwoNodes()
    mesh.model.fails_with = StageLost("a stage ended")
    async with serving(mesh.joiner) as running, running.client() as client:
        response = await client.post("/v1/chat/completions", json=HELLO)
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert response.json()["error"]["type"] == "unavailable_error"


async def test_a_client_that_leaves_the_joiner_frees_the_lane_of_the_head() -> None:
    mesh = TwoNodes()
    mesh.model.stall_at = 2
    async with serving(mesh.joiner) as running:
        stream = await raw_request(running.port, STREAMED)
        await mesh.model.waiting.wait()
        await stream.aclose()
        await mesh.model.freed.wait()


async def test_a_link_lost_in_a_stream_is_an_error_event() -> None:
    mesh = TwoNodes()
    mesh.link_breaks_after = 2
    async with serving(mesh.joiner) as running, running.client() as client:
        response = await client.post("/v1/chat/completions", json=STREAMED)
    error = events(response.text)[-1]["error"]
    assert (error["type"], error["message"]) == (
        "unavailable_error",
        "the node that serves this model was lost; try again",
    )


async def test_a_request_is_passed_on_only_once() -> None:
    mesh = TwoNodes()
    mesh.head.served.clear()
    mesh.head.elsewhere[mesh.model.id] = mesh.carry
    async with serving(mesh.joiner) as running, running.client() as client:
        response = await client.post("/v1/chat/completions", json=HELLO)
    assert (response.status_code, len(mesh.requests)) == (503, 1)


async def test_shutdown_of_the_joiner_ends_a_passed_stream_with_a_terminal_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "FINISH_S", 0.01)
    mesh = TwoNodes()
    mesh.model.stall_at = 2
    async with serving(mesh.joiner) as running:
        async with await raw_request(running.port, STREAMED) as stream:
            await mesh.model.waiting.wait()
            running.shutdown.set()
            received = b"".join([part async for part in stream])
        await running.ended.wait()
    assert b'"this node is shutting down"' in received
    assert mesh.model.lanes == 0


async def test_only_what_is_asked_of_a_model_is_reached_from_other_nodes() -> None:
    passed = build_endpoint(ByteDirectory(ByteModel())).passed
    for method, path in [("GET", "/v1/models"), ("GET", "/api/status"), ("GET", "/health")]:
        async with answer_here(passed, PassedRequest(method, path, (), b"")) as answer:
            assert answer.status == 404


async def _lose_in(context: AbstractAsyncContextManager[PassedAnswer]) -> None:
    async with context as answer:
        assert answer.status == 200
        raise LinkLost("gone")


async def test_what_the_caller_raises_comes_out_as_it_was() -> None:
    body = b'{"prompt":"x","stream":true}'
    request = PassedRequest("POST", "/v1/completions", (("content-type", "application/json"),), body)
    model = ByteModel()
    model.stall_at = 1
    passed = build_endpoint(ByteDirectory(model)).passed
    with trio.fail_after(30), pytest.raises(LinkLost, match="gone"):
        await _lose_in(answer_here(passed, request))
    assert model.lanes == 0


async def test_r84_a_key_has_an_owner_of_its_own_at_the_head_and_no_client_can_choose_it() -> None:
    mesh, access = TwoNodes(), Access(keys=frozenset({"one", "two"}))
    async with serving(mesh.joiner, access=access) as running, running.client() as client:
        for key in ("one", "two", "one"):
            headers = {"x-api-key": key, "x-meshnode-owner": "chosen"}
            await client.post("/v1/chat/completions", json=HELLO, headers=headers)
    first, second, third = [request.owner or "" for request in mesh.model.seen]
    assert first == third != second
    sent = [value for request in mesh.requests for _, value in request.headers]
    assert not {"one", "two", "chosen"} & {first, second, *sent}
    async with serving(mesh.head, access=access) as running, running.client() as client:
        headers = {"x-api-key": "one", "x-meshnode-owner": "chosen"}
        await client.post("/v1/chat/completions", json=HELLO, headers=headers)
    assert mesh.model.seen[-1].owner not in (first, second, "", "chosen")


async def test_without_keys_all_clients_are_one_owner_wherever_they_ask() -> None:
    mesh = TwoNodes()
    for directory in (mesh.joiner, mesh.head):
        async with serving(directory) as running, running.client() as client:
            await client.post("/v1/chat/completions", json=HELLO, headers={"x-meshnode-owner": "chosen"})
    assert [request.owner for request in mesh.model.seen] == ["", ""]
