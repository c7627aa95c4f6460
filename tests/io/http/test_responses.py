from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from meshnode.errors import StageLost
from tests.io.http.byte_model import ByteDirectory, ByteModel
from tests.io.http.mesh import TwoNodes
from tests.io.http.serving import serving
from tests.io.http.test_openai_client import MODEL, client_of
from tests.io.http.test_thoughts import thinker

# As in test_openai_client: the client leaves its generators to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


async def respond(model: ByteModel, path: str = "/v1/responses", **fields: Any) -> httpx.Response:
    async with serving(ByteDirectory(model)) as server, server.client() as client:
        return await client.post(path, json={"input": "hi", **fields})


async def test_the_official_client_gets_a_text() -> None:
    async with client_of(ByteModel("Hello.")) as client:
        answer = await client.responses.create(model=MODEL, input="hi", instructions="short", temperature=0)
    assert (answer.output_text, answer.status, answer.error) == ("Hello.", "completed", None)
    assert answer.usage is not None
    assert (answer.usage.output_tokens, answer.usage.total_tokens) == (7, answer.usage.input_tokens + 7)
    assert (answer.instructions, answer.temperature, answer.store) == ("short", 0, False)


@pytest.mark.parametrize("model", [ByteModel("Hello, wörld."), thinker()])
async def test_the_official_client_sees_every_event_in_order_and_the_same_text(model: ByteModel) -> None:
    async with client_of(model) as client:
        whole = await client.responses.create(model=MODEL, input="hi")
        events = [event async for event in await client.responses.create(model=MODEL, input="hi", stream=True)]
    kinds = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    last = events[-1].response
    assert text == whole.output_text == last.output_text
    assert [item.type for item in last.output] == [item.type for item in whole.output]
    assert last.usage == whole.usage
    if last.output[0].type == "reasoning":
        assert thought == last.output[0].content[0].text == "Hm, é."


async def test_the_stream_helper_of_the_official_client_accumulates_it() -> None:
    async with (
        client_of(ByteModel("Hello.")) as client,
        client.responses.stream(model=MODEL, input="hi") as stream,
    ):
        final = await stream.get_final_response()
    assert final.output_text == "Hello."


async def test_a_conversation_is_the_chat_of_its_items() -> None:
    model = ByteModel()
    items = [
        {"role": "developer", "content": "short"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "id": "x", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"role": "user", "content": "c"},
    ]
    response = await respond(model, input=items)
    assert response.status_code == 200
    assert bytes(model.seen[0].prompt[1:]) == b"system: short\nuser: a\nassistant: b\nuser: c\nassistant:"


async def test_usage_tells_what_came_out_of_a_cache() -> None:
    model = ByteModel("Hello.")
    model.cached = 5
    assert (await respond(model)).json()["usage"]["input_tokens_details"] == {"cached_tokens": 5}


async def test_what_max_output_tokens_cut_off_is_incomplete_streamed_or_not() -> None:
    whole = (await respond(ByteModel("Hello"), max_output_tokens=2)).json()
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert whole["output"][0]["content"][0]["text"] == "He"
    streamed = (await respond(ByteModel("Hello"), max_output_tokens=2, stream=True)).text
    assert "event: response.incomplete\n" in streamed
    assert "[DONE]" not in streamed


async def test_an_answer_without_text_still_has_its_message() -> None:
    assert (await respond(ByteModel(""))).json()["output"][0]["content"][0]["text"] == ""


async def test_tokens_of_the_input_can_be_counted_first() -> None:
    model = ByteModel()
    counted = (await respond(model, "/v1/responses/input_tokens")).json()
    assert model.seen == []
    answered = (await respond(model)).json()
    assert counted["input_tokens"] == answered["usage"]["input_tokens"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "json_schema", "schema": 5}}}, "text.format"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
    ],
)
async def test_what_a_stateless_answer_cannot_be_is_400(fields: dict[str, Any], param: str) -> None:
    response = await respond(ByteModel(), **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("stall_at", [-1, 2])
async def test_errors_before_and_in_a_stream_reach_the_official_client(stall_at: int) -> None:
    model = ByteModel()
    model.stall_at, model.fails_with = stall_at, StageLost("a stage ended")
    async with client_of(model) as client:
        with pytest.raises(openai.APIError, match="a stage ended"):
            async for _ in await client.responses.create(model=MODEL, input="hi", stream=True):
                pass


async def test_a_node_without_the_head_streams_the_same_events() -> None:
    mesh = TwoNodes()
    async with serving(mesh.joiner) as server, server.client() as client:
        text = (await client.post("/responses", json={"model": mesh.model.id, "input": "x", "stream": True})).text
    assert "event: response.completed\n" in text
