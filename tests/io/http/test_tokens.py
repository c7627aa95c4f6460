from __future__ import annotations

from typing import Any

import httpx
import pytest

from meshnode.io.http import tokens
from tests.io.http.byte_model import BOS, END, HUGE, ByteDirectory, ByteModel
from tests.io.http.mesh import TwoNodes
from tests.io.http.serving import serving

HELLO = [{"role": "user", "content": "hi"}]


async def posted(path: str, body: Any, model: ByteModel | None = None) -> httpx.Response:
    async with serving(ByteDirectory(model or ByteModel())) as server, server.client() as client:
        return await client.post(path, json=body)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
async def test_llama_servers_content_and_vllms_prompt_differ_in_who_adds_the_first_token(path: str) -> None:
    content = (await posted(path, {"content": "hé"})).json()
    prompt = (await posted(path, {"prompt": "hé"})).json()
    assert content == {"tokens": [104, 195, 169], "token_strs": None, "count": 3, "max_model_len": 512}
    assert prompt["tokens"] == [BOS, 104, 195, 169]
    assert (await posted(path, {"content": "h", "add_special": True})).json()["tokens"] == [BOS, 104]
    assert (await posted(path, {"prompt": "h", "add_special_tokens": False})).json()["tokens"] == [104]


async def test_pieces_are_text_or_bytes_where_a_token_is_part_of_a_character() -> None:
    answer = (await posted("/tokenize", {"content": "aé", "with_pieces": True})).json()
    assert answer["tokens"] == [
        {"id": 97, "piece": "a"},
        {"id": 195, "piece": [195]},
        {"id": 169, "piece": [169]},
    ]
    strings = (await posted("/tokenize", {"prompt": "a", "return_token_strs": True})).json()["token_strs"]
    assert strings == ["<|bos|>", "a"]


async def test_messages_are_tokenized_as_the_chat_of_them_would_be() -> None:
    model = ByteModel()
    answer = (await posted("/tokenize", {"messages": HELLO}, model)).json()
    await posted("/v1/chat/completions", {"messages": HELLO}, model)
    assert tuple(answer["tokens"]) == model.seen[0].prompt
    bare = (await posted("/tokenize", {"messages": HELLO, "add_special_tokens": False})).json()["tokens"]
    assert bare == answer["tokens"][1:]


async def test_detokenizing_writes_out_control_tokens_under_both_names() -> None:
    answer = (await posted("/detokenize", {"tokens": [BOS, *"hé".encode(), END]})).json()
    assert answer == {"content": "<|bos|>hé<|end|>", "prompt": "<|bos|>hé<|end|>"}


async def test_the_tokenizer_says_what_lm_eval_asks_for() -> None:
    async with serving(ByteDirectory(ByteModel())) as server, server.client() as client:
        info = (await client.get("/v1/tokenizer_info")).json()
    assert (info["eos_token"], info["bos_token"], info["add_bos_token"]) == ("<|end|>", "<|bos|>", True)
    assert (info["vocab_size"], info["model_max_length"], info["chat_template"]) == (259, 512, None)


async def test_a_template_is_applied_without_computing_anything() -> None:
    model = ByteModel()
    answer = await posted("/apply-template", {"messages": HELLO}, model)
    assert answer.json() == {"prompt": "user: hi\nassistant:"}
    assert model.seen == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, None),
        ("/tokenize", {"content": "a", "prompt": "b"}, "prompt"),
        ("/tokenize", {"content": 5}, "content"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HELLO, "tools": [{}]}, "tools[0].function"),
        ("/tokenize", {"content": "a", "add_special": "yes"}, "add_special"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens"),
        ("/detokenize", {"tokens": [259]}, "tokens"),
        ("/detokenize", {"tokens": [2**70]}, None),
        ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
        ("/apply-template", {}, "messages"),
        ("/apply-template", {"messages": [{"role": ""}]}, "messages[0].role"),
    ],
)
async def test_wrong_inputs_are_400_and_name_the_field(path: str, body: Any, param: str | None) -> None:
    response = await posted(path, body)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert param is None or error["param"] == param


async def test_an_answer_of_huge_pieces_is_refused_before_it_is_made() -> None:
    for path, body in [("/detokenize", {"tokens": [HUGE] * 40})]:
        response = await posted(path, body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")


async def test_more_ids_than_a_text_can_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "DETOKENIZED_IDS", 3)
    assert (await posted("/detokenize", {"tokens": [97] * 3})).status_code == 200
    response = await posted("/detokenize", {"tokens": [97] * 4})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")


async def test_the_family_works_on_a_node_that_does_not_run_the_head() -> None:
    mesh = TwoNodes()
    async with serving(mesh.joiner) as server, server.client() as client:
        named = {"model": mesh.model.id}
        assert (await client.post("/tokenize", json={**named, "content": "a"})).json()["tokens"] == [97]
        assert (await client.post("/detokenize", json={**named, "tokens": [97]})).json()["content"] == "a"
        assert (await client.post("/apply-template", json={"messages": HELLO})).json()["prompt"] == (
            "user: hi\nassistant:"
        )
        assert (await client.get("/tokenizer_info")).json()["eos_token"] == "<|end|>"
        assert (await client.get("/tokenizer_info?model=org/byte-model&other=%00")).json()["eos_token"] == "<|end|>"
        assert (await client.get("/tokenizer_info?model=nothing")).status_code == 404
    assert mesh.requests[-1].path == "/tokenizer_info?model=org%2Fbyte-model"
