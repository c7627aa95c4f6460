from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from meshnode.errors import MeshError, Overloaded, PeerError, StageError, StageLost, TimedOut, Unavailable
from meshnode.io.http.fields import NEVER
from tests.io.http.byte_model import BOS, END, VOCABULARY, ByteDirectory, ByteModel
from tests.io.http.serving import events, serving

HELLO = {"messages": [{"role": "user", "content": "hi"}]}


async def asked(model: ByteModel, path: str, body: Any) -> httpx.Response:
    async with serving(ByteDirectory(model)) as server, server.client() as client:
        return await client.post(path, json=body)


async def chat(served: ByteModel, **fields: Any) -> httpx.Response:
    return await asked(served, "/v1/chat/completions", {**HELLO, **fields})


async def complete(model: ByteModel, **fields: Any) -> httpx.Response:
    return await asked(model, "/v1/completions", {"max_tokens": 100, **fields})


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions"])
async def test_a_chat_is_answered(path: str) -> None:
    model = ByteModel("Hello.")
    answer = (await asked(model, path, HELLO)).json()
    choice = answer["choices"][0]
    assert (answer["object"], answer["model"], choice["finish_reason"]) == ("chat.completion", model.id, "stop")
    assert answer["system_fingerprint"] == model.fingerprint
    assert choice["message"] == {"role": "assistant", "content": "Hello.", "refusal": None}
    assert answer["usage"]["completion_tokens"] == len("Hello.") + 1
    assert answer["usage"]["prompt_tokens"] == len("user: hi\nassistant:") + 1


async def test_the_prompt_of_a_chat_is_the_template_with_one_bos() -> None:
    model = ByteModel()
    await chat(model, messages=[{"role": "developer", "content": [{"type": "text", "text": "short"}]}])
    assert bytes(model.seen[0].prompt[1:]) == b"system: short\nassistant:"
    assert model.seen[0].prompt[0] == BOS
    await chat(model, messages=[{"role": "<|bos|>", "content": "hi"}])
    assert model.seen[1].prompt.count(BOS) == 1


@pytest.mark.parametrize("tokens", [1, 2, 5])
async def test_r16_generation_stops_at_exactly_max_tokens(tokens: int) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = (await chat(ByteModel("Hello."), **{name: tokens})).json()
        assert answer["choices"][0]["message"]["content"] == "Hello."[:tokens]
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == tokens


async def test_without_max_tokens_a_chat_may_fill_the_context_and_a_completion_has_sixteen() -> None:
    model = ByteModel()
    await chat(model)
    await asked(model, "/v1/completions", {"prompt": "hi"})
    assert model.seen[0].max_tokens == model.context - len(model.seen[0].prompt)
    assert model.seen[1].max_tokens == 16


async def test_usage_tells_how_much_of_the_prompt_was_not_computed() -> None:
    model = ByteModel("Hello.")
    model.cached = 5
    answer = (await chat(model)).json()
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}
    several = (await complete(model, prompt=["one prompt", "another one"], n=2)).json()
    assert several["usage"]["prompt_tokens_details"] == {"cached_tokens": 10}, "each prompt counts once"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_client_may_have_every_row_of_its_prompt_computed_and_none_kept(path: str) -> None:
    model = ByteModel("Hello.")
    model.cached = 5
    for said, owner in ((False, None), (True, ""), (None, "")):
        answer = (await asked(model, path, {**HELLO, "prompt": "hi there", "cache_prompt": said})).json()
        assert model.seen[-1].owner == owner
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == (0 if owner is None else 5)


@pytest.mark.parametrize(("seed", "repeatable"), [(None, False), (-1, False), (0, True), (7, True)])
async def test_who_gives_a_seed_gets_the_same_bits_again(seed: int | None, repeatable: bool) -> None:
    model = ByteModel()
    await chat(model, seed=seed)
    await complete(model, prompt="hi", seed=seed)
    assert [request.repeatable for request in model.seen] == [repeatable] * 2


async def test_sampling_fields_reach_the_head() -> None:
    model = ByteModel()
    await chat(
        model, temperature=0, top_p=0.5, top_k=7, min_p=0.1, seed=42, presence_penalty=1, frequency_penalty=-1,
        repeat_penalty=1.5, repeat_last_n=9, logit_bias={"5": -100}, unknown_field={"a": 1}, store=None,
    )  # fmt: skip
    sampling = model.seen[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 7, 0.1)
    assert (sampling.seed, sampling.presence_penalty, sampling.frequency_penalty) == (42, 1, -1)
    assert (sampling.repeat_penalty, sampling.penalty_window, sampling.logit_bias) == (1.5, 9, ((5, -100.0),))
    assert sampling.top_logprobs == -1


async def test_without_a_seed_every_request_draws_its_own() -> None:
    model = ByteModel()
    await chat(model)
    await chat(model)
    assert model.seen[0].sampling.seed != model.seen[1].sampling.seed


@pytest.mark.parametrize("stop", [", ", [", "], ["never", ", "]])
async def test_a_stop_string_ends_the_answer_and_frees_the_lane(stop: Any) -> None:
    model = ByteModel("Hello, world.")
    choice = (await chat(model, stop=stop)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello", "stop")
    assert model.lanes == 0


async def test_n_choices_have_their_own_index_and_seed() -> None:
    model = ByteModel("Hi")
    answer = (await chat(model, n=6, seed=2**64 - 1)).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert {request.sampling.seed for request in model.seen} == {2**64 - 1, 0, 1, 2, 3, 4}
    assert len({request.id for request in model.seen}) == 6
    assert answer["usage"]["completion_tokens"] == 6 * 3


async def test_prompts_may_be_text_ids_or_lists_of_either() -> None:
    model = ByteModel("ok")
    for prompt, expected in [
        ("ab", [(BOS, 97, 98)]),
        ([97, 98], [(97, 98)]),
        (["a", "b"], [(BOS, 97), (BOS, 98)]),
        ([[97], [98, 99]], [(97,), (98, 99)]),
    ]:
        model.seen.clear()
        answer = (await complete(model, prompt=prompt)).json()
        assert sorted(request.prompt for request in model.seen) == sorted(expected)
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_choices_of_several_prompts_count_prompt_times_n_plus_i() -> None:
    model = ByteModel("ok")
    answer = (await complete(model, prompt=["a", "b"], n=2, echo=True)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["aok", "aok", "bok", "bok"]


def filler(answer: str = "mid") -> ByteModel:
    """A model with tokens for filling in: 1, 2 and 3."""
    model = ByteModel(answer)
    model.vocabulary = msgspec.structs.replace(VOCABULARY, fim=(1, 2, 3))
    return model


async def test_a_suffix_becomes_the_models_own_order_of_prefix_suffix_and_middle() -> None:
    model = filler()
    answer = (await complete(model, prompt="ab", suffix="c<|bos|>", echo=True)).json()
    assert model.seen[0].prompt == (BOS, 1, 97, 98, 2, 99, BOS, 3)
    assert answer["choices"][0]["text"] == "abmid"
    assert answer["usage"]["prompt_tokens"] == 8
    model.seen.clear()
    await complete(model, prompt=[[97], [BOS, 98]], suffix="c", n=2)
    assert sorted({request.prompt for request in model.seen}) == [(1, 97, 2, 99, 3), (BOS, 1, 98, 2, 99, 3)]
    assert len(model.seen) == 4


async def test_a_suffix_for_a_model_that_cannot_fill_in_is_400() -> None:
    response = await complete(ByteModel(), prompt="a", suffix="b")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "suffix")
    assert (await complete(ByteModel(), prompt="a", suffix="")).status_code == 200


async def test_a_suffix_counts_for_the_context() -> None:
    response = await complete(filler(), prompt="a" * 300, suffix="b" * 300)
    assert (response.status_code, response.json()["error"]["n_prompt_tokens"]) == (400, 604)


async def test_with_ignore_eos_what_ends_an_answer_is_never_drawn() -> None:
    model = ByteModel()
    await complete(model, prompt="a", ignore_eos=True, logit_bias={"5": 1})
    sampling = model.seen[0].sampling
    assert sampling.ignore_eos
    assert sampling.logit_bias == ((5, 1.0), (END, NEVER))
    assert sampling.defect() == ""


async def test_a_vocabulary_of_ends_does_not_outgrow_what_travels() -> None:
    model = ByteModel()
    model.vocabulary = msgspec.structs.replace(VOCABULARY, end=frozenset(range(259)))
    await complete(model, prompt="a", ignore_eos=True, logit_bias={str(token): 1 for token in range(200)})
    full = {f"{token}": 1 for token in range(259)}
    await complete(model, prompt="a", ignore_eos=True, logit_bias=full)
    assert [len(request.sampling.logit_bias) for request in model.seen] == [459, 518]
    assert all(request.sampling.defect() == "" for request in model.seen)


async def test_chat_logprobs_carry_bytes_and_alternatives() -> None:
    content = (await chat(ByteModel("é"), logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9]]
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2]
    assert content[0]["logprob"] == -0.5
    assert content[0]["top_logprobs"][1] == {"token": "\ufffd", "logprob": -1.5, "bytes": [0xC4]}


async def test_legacy_logprobs_have_the_legacy_shape() -> None:
    logprobs = (await complete(ByteModel("aé!"), prompt="x", logprobs=1)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert logprobs["top_logprobs"][0] == {"a": -0.5}


async def test_a_missing_model_name_means_the_only_model() -> None:
    assert (await chat(ByteModel(), model="")).status_code == 200


async def test_of_several_models_one_must_be_named() -> None:
    directory = ByteDirectory(ByteModel(name="a"), ByteModel(name="b"))
    async with serving(directory) as server, server.client() as client:
        missing = await client.post("/v1/chat/completions", json=HELLO)
        unknown = await client.post("/v1/chat/completions", json={**HELLO, "model": "c"})
        named = await client.post("/v1/chat/completions", json={**HELLO, "model": "b"})
    assert (missing.status_code, missing.json()["error"]["param"]) == (400, "model")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert named.json()["model"] == "b"


@pytest.mark.parametrize(
    ("state", "message"),
    [("loading", "Loading model"), ("failed", "the model could not be loaded; `meshnode status` says why")],
)
async def test_r59_a_model_that_is_not_ready_is_503(state: Any, message: str) -> None:
    directory = ByteDirectory(ByteModel())
    directory.states["org/byte-model"] = state
    async with serving(directory) as server, server.client() as client:
        response = await client.post("/v1/chat/completions", json={**HELLO, "model": "org/byte-model"})
    assert (response.status_code, response.json()["error"]["message"]) == (503, message)
    assert "retry-after" in response.headers


FAILURES = [
    (Overloaded("full"), 429, "rate_limit_error", "rate_limit_exceeded"),
    (Unavailable("draining"), 503, "unavailable_error", 503),
    (StageLost("a stage ended"), 503, "unavailable_error", 503),
    (TimedOut("no token"), 504, "timeout_error", None),
    (StageError("decode", "a stage failed"), 500, "server_error", "stage"),
    (PeerError("a peer"), 500, "server_error", "peer"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "kind", "code"), FAILURES)
async def test_r51_errors_of_the_head_have_their_status_also_when_a_stream_was_asked(
    error: MeshError, status: int, kind: str, code: Any, stream: bool
) -> None:
    model = ByteModel()
    model.fails_with = error
    response = await chat(model, stream=stream)
    body = response.json()["error"]
    assert (response.status_code, body["type"], body["code"]) == (status, kind, code)
    assert response.headers.get("retry-after") == {429: "1", 503: "3"}.get(status)


@pytest.mark.parametrize("stream", [False, True])
async def test_r58_a_prompt_that_never_fits_says_both_sizes(stream: bool) -> None:
    model = ByteModel()
    response = await complete(model, prompt="x" * 600, stream=stream)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert (error["type"], error["n_prompt_tokens"], error["n_ctx"]) == ("exceed_context_size_error", 601, 512)
    # By these words LangChain and LiteLLM tell it from other errors.
    assert "Input tokens exceed the configured limit" in error["message"]
    assert model.seen == []


async def test_an_error_after_the_stream_began_is_an_event_and_the_end() -> None:
    model = ByteModel("Hello")
    model.stall_at, model.fails_with = 2, StageLost("a stage ended")
    response = await chat(model, stream=True)
    *_, before, last = events(response.text)
    assert response.status_code == 200
    assert before["choices"][0]["delta"]["content"] == "e"
    assert last["error"]["type"] == "unavailable_error"
    assert "[DONE]" not in response.text
