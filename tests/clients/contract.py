"""What every client must see, whichever it is. A test file composes the parts that its client has.

Everything asked is greedy or seeded, and the demonstration model's answers are known word for word: a client that sees
other text has lost or misread some of it.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from meshnode.demo import ANSWERS, EXPECTED_ANSWER, LONG_QUESTION, QUESTION, UNICODE_QUESTION
from tests.clients.actor import Actor, Refused
from tests.e2e.nodes import WAIT_S, RealMesh, until

MODEL_ID = "meshnode-demo"
WORD = ANSWERS[LONG_QUESTION].split()[5]
TOO_LONG = "word " * 6000
"""More tokens than the mesh's 2,048 of context."""

LASTING = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}
"""An answer that is far longer than anybody waits for here."""


def asking(question: str = QUESTION, **more: Any) -> dict[str, Any]:
    """A chat of one question, greedy unless said otherwise."""
    return {"model": MODEL_ID, "messages": [{"role": "user", "content": question}], "temperature": 0, **more}


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(choice["text"] or "" for chunk in chunks for choice in chunk["choices"] if choice["index"] == index)


def finishes_of(chunks: list[dict[str, Any]]) -> list[str]:
    return [choice["finish"] for chunk in chunks for choice in chunk["choices"] if choice["finish"]]


def refusal(client: Actor, what: str, **ask: Any) -> Refused:
    with pytest.raises(Refused) as refused:
        client.do(what, **ask)
    return refused.value


def health(mesh: RealMesh) -> dict[str, Any]:
    """Of the node with the head."""
    return httpx.get(f"{mesh.nodes[0].url}/health", timeout=WAIT_S).json()


def rejected(mesh: RealMesh) -> int:
    return sum(count for name, count in health(mesh).items() if name.startswith("rejected_"))


def all_lanes_free(mesh: RealMesh) -> None:
    until("all lanes are free", lambda: health(mesh)["lanes_busy"] == health(mesh)["queued"] == 0)


class Models:
    """Clients that list models."""

    def test_it_lists_the_model(self, client: Actor) -> None:
        assert client.do("models") == [MODEL_ID]


class Chat:
    """Chat whole and streamed: what every client can do."""

    NOT_FOUND = "NotFoundError"
    BAD_REQUEST = "BadRequestError"
    TIMEOUT = "APITimeoutError"

    def test_a_whole_answer_comes_with_its_finish_and_usage(self, client: Actor) -> None:
        answer = client.do("chat", **asking())
        choice = answer["choices"][0]
        assert (choice["role"], choice["text"], choice["finish"]) == ("assistant", EXPECTED_ANSWER, "stop")
        assert answer["model"].removeprefix("openai/") == MODEL_ID
        usage = answer["usage"]
        assert usage["completion"] > 10
        assert usage["prompt"] + usage["completion"] == usage["total"]

    def test_a_stream_gives_the_same_words_piece_by_piece(self, client: Actor) -> None:
        chunks = client.do("chat_stream", **asking())
        assert text_of(chunks) == EXPECTED_ANSWER
        assert len([chunk for chunk in chunks if text_of([chunk])]) > 10
        assert finishes_of(chunks) == ["stop"]

    def test_a_stream_that_is_asked_for_usage_ends_with_that_of_the_whole_answer(self, client: Actor) -> None:
        chunks = client.do("chat_stream", **asking(stream_options={"include_usage": True}))
        counted = [chunk["usage"] for chunk in chunks if chunk["usage"]]
        assert counted == [client.do("chat", **asking())["usage"]]

    def test_characters_that_tokens_cut_arrive_whole(self, client: Actor) -> None:
        chunks = client.do("chat_stream", **asking(UNICODE_QUESTION))
        assert text_of(chunks) == ANSWERS[UNICODE_QUESTION]

    def test_a_conversation_with_system_and_history_is_understood(self, client: Actor) -> None:
        messages = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": EXPECTED_ANSWER},
            {"role": "user", "content": LONG_QUESTION},
        ]
        assert client.do("chat", **asking())["choices"][0]["text"] == EXPECTED_ANSWER
        asked = {**asking(), "messages": messages}
        assert client.do("chat", **asked)["choices"][0]["text"] == text_of(client.do("chat_stream", **asked))

    @pytest.mark.parametrize("stop", [WORD, ["no such text", WORD]])
    def test_a_stop_string_ends_the_text_before_itself(self, client: Actor, stop: Any) -> None:
        asked = asking(LONG_QUESTION, stop=stop)
        wanted = ANSWERS[LONG_QUESTION].partition(WORD)[0]
        choice = client.do("chat", **asked)["choices"][0]
        assert (choice["text"], choice["finish"]) == (wanted, "stop")
        chunks = client.do("chat_stream", **asked)
        assert (text_of(chunks), finishes_of(chunks)) == (wanted, ["stop"])

    def test_max_tokens_are_kept_to_the_token(self, client: Actor) -> None:
        answer = client.do("chat", **asking(LONG_QUESTION, max_tokens=7))
        assert answer["choices"][0]["finish"] == "length"
        assert answer["usage"]["completion"] == 7
        assert ANSWERS[LONG_QUESTION].startswith(answer["choices"][0]["text"])

    def test_a_seed_repeats_a_sampled_answer_and_another_does_not(self, client: Actor) -> None:
        def sampled(seed: int) -> str:
            asked = asking("A node", temperature=1.9, top_p=0.99, max_tokens=40, seed=seed)
            return client.do("chat", **asked)["choices"][0]["text"]

        assert sampled(7) == sampled(7)
        assert len({sampled(seed) for seed in range(1, 5)}) > 1

    def test_an_unknown_model_raises_what_its_users_catch(self, client: Actor) -> None:
        for what in ("chat", "chat_stream"):
            refused = refusal(client, what, **{**asking(), "model": "nothing"})
            assert self.NOT_FOUND in refused.kinds, refused
            assert refused.status in (404, None)
            assert "nothing" in refused.message

    def test_a_prompt_beyond_the_context_raises_what_its_users_catch(self, client: Actor) -> None:
        refused = refusal(client, "chat", **asking(TOO_LONG))
        assert self.BAD_REQUEST in refused.kinds, refused
        assert refused.status in (400, None)
        assert "2048" in refused.message

    def test_a_wrong_value_is_refused_with_its_name(self, client: Actor) -> None:
        refused = refusal(client, "chat", **asking(top_p=7))
        assert self.BAD_REQUEST in refused.kinds, refused
        assert "top_p" in refused.message

    def test_eight_at_once_whole_and_streamed_get_their_own_answers(self, client: Actor) -> None:
        questions = list(ANSWERS)[:8]
        answers = client.do("together", asks=[asking(question) for question in questions])
        assert answers == [ANSWERS[question] for question in questions]

    def test_a_client_that_leaves_in_mid_stream_frees_its_lane(self, client: Actor, mesh: RealMesh) -> None:
        """More than there are lanes, each with far more to come than is waited for."""
        for _ in range(6):
            assert client.do("leave", **asking(**LASTING))
        all_lanes_free(mesh)
        assert client.do("chat", **asking())["choices"][0]["text"] == EXPECTED_ANSWER


class Chunks:
    """Clients that show chunks as they came."""

    def test_chunks_are_of_one_answer_and_in_order(self, client: Actor) -> None:
        chunks = client.do("chat_stream", **asking(stream_options={"include_usage": True}))
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
        kinds = [kind_of(chunk) for chunk in chunks]
        assert kinds == ["role", *["text"] * (len(kinds) - 3), "finish", "usage"]

    def test_without_being_asked_no_chunk_has_usage(self, client: Actor) -> None:
        chunks = client.do("chat_stream", **asking())
        assert [chunk["usage"] for chunk in chunks if chunk["usage"]] == []
        assert kind_of(chunks[-1]) == "finish"


def kind_of(chunk: dict[str, Any]) -> str:
    if not chunk["choices"]:
        return "usage" if chunk["usage"] else "nothing"
    choice = chunk["choices"][0]
    if choice["finish"]:
        return "text and finish" if choice["text"] else "finish"
    return "text" if choice["text"] else "role" if choice["role"] == "assistant" else "nothing"


class Choices:
    """Clients that ask for several answers."""

    def test_n_answers_come_whole_and_streamed_and_the_first_is_that_of_n_1(self, client: Actor) -> None:
        asked = asking("A node", temperature=1.9, max_tokens=20, seed=11)
        answer = client.do("chat", **asked, n=3)
        texts = [choice["text"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert texts[0] == client.do("chat", **asked)["choices"][0]["text"]
        assert len(set(texts)) > 1
        chunks = client.do("chat_stream", **asked, n=3)
        assert [text_of(chunks, index) for index in range(3)] == texts


WAITING = 16
"""Requests that may wait where four lanes are busy."""


@contextmanager
def every_lane_and_place_taken(mesh: RealMesh) -> Iterator[None]:
    """By streams that nobody reads, until the block ends."""
    head = mesh.nodes[0]
    body = json.dumps({**asking(max_tokens=1900, ignore_eos=True), "stream": True}).encode()
    length = f"Content-Length: {len(body)}\r\n\r\n".encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with ExitStack() as connections:
        for _ in range(4 + WAITING):
            made = socket.create_connection(("127.0.0.1", int(head.url.rpartition(":")[2])), timeout=WAIT_S)
            connections.enter_context(made)
            made.sendall(request + length + body)
        until("the queue is full", lambda: health(mesh)["queued"] == WAITING)
        yield


class Patience:
    """SDKs that try again by themselves."""

    def test_a_full_queue_is_a_rate_limit(self, client: Actor, mesh: RealMesh) -> None:
        with every_lane_and_place_taken(mesh):
            refused = refusal(client, "impatient", **asking(timeout=60))
        assert "RateLimitError" in refused.kinds, refused
        assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
        all_lanes_free(mesh)

    def test_a_request_that_met_a_full_queue_is_tried_again_and_answered(self, client: Actor, mesh: RealMesh) -> None:
        with ThreadPoolExecutor(1) as elsewhere:
            with every_lane_and_place_taken(mesh):
                before = rejected(mesh)
                asked = elsewhere.submit(client.do, "chat", **asking())
                until("it was refused once", lambda: rejected(mesh) > before)
            assert asked.result()["choices"][0]["text"] == EXPECTED_ANSWER
        all_lanes_free(mesh)


class Responses:
    """SDKs with OpenAI's newer route."""

    ASKED_RESPONSE = {"model": MODEL_ID, "input": QUESTION, "temperature": 0}  # noqa: RUF012 - never changed

    def test_a_response_says_what_a_chat_says(self, client: Actor) -> None:
        answer = client.do("response", **self.ASKED_RESPONSE)
        assert (answer["text"], answer["status"]) == (EXPECTED_ANSWER, "completed")
        assert answer["usage"] == client.do("chat", **asking())["usage"]

    def test_a_response_that_was_cut_off_says_so(self, client: Actor) -> None:
        answer = client.do("response", **self.ASKED_RESPONSE, max_output_tokens=16)
        assert (answer["status"], answer["usage"]["completion"]) == ("incomplete", 16)

    def test_a_streamed_response_is_the_whole_one_in_its_events(self, client: Actor) -> None:
        found = client.do("response_stream", **self.ASKED_RESPONSE)
        kinds = [event["type"] for event in found["events"]]
        assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
        pieces = [event["text"] for event in found["events"] if event["type"] == "response.output_text.delta"]
        assert "".join(pieces) == found["text"] == EXPECTED_ANSWER


class Structured:
    """Clients that ask for answers of a schema, and read them."""

    SCHEMA = {  # noqa: RUF012 - never changed
        "title": "answer",
        "type": "object",
        "properties": {
            "word": {"type": "string", "enum": ["node", "stage", "lane"]},
            "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
            "sure": {"type": ["boolean", "null"]},
        },
        "required": ["word", "sizes", "sure"],
        "additionalProperties": False,
    }

    def test_an_answer_keeps_to_its_schema_however_it_is_drawn(self, client: Actor) -> None:
        for seed in range(3):
            found = client.do("structured", **asking(temperature=1.9, seed=seed), schema=self.SCHEMA)
            assert sorted(found) == ["sizes", "sure", "word"]
            assert found["word"] in ("node", "stage", "lane")
            assert found["sure"] in (True, False, None)
            assert len(found["sizes"]) <= 3
            assert all(isinstance(size, int) and 0 <= size <= 99 for size in found["sizes"])

    def test_a_schema_that_cannot_be_enforced_raises_what_its_users_catch(self, client: Actor) -> None:
        unenforced = {**self.SCHEMA, "not": {"required": ["word"]}}
        refused = refusal(client, "structured", **asking(), schema=unenforced)
        assert (refused.status, "BadRequestError" in refused.kinds) == (400, True)
        assert "not" in refused.message


class Logprobs:
    """Clients that show log-probabilities of a chat."""

    def test_logprobs_spell_the_text_and_the_best_is_the_one_taken(self, client: Actor) -> None:
        choice = client.do("chat", **asking(logprobs=True, top_logprobs=3))["choices"][0]
        spelled = b"".join(bytes(each["bytes"]) for each in choice["logprobs"])
        assert spelled.decode().startswith(choice["text"])
        for each in choice["logprobs"]:
            best = each["top"][0]
            assert len(each["top"]) == 3
            assert (best["token"], best["logprob"]) == (each["token"], each["logprob"])
            assert sum(math.exp(top["logprob"]) for top in each["top"]) <= 1 + 1e-4


class StreamedLogprobs:
    def test_streamed_logprobs_are_those_of_the_whole_answer(self, client: Actor) -> None:
        asked = asking(logprobs=True, top_logprobs=2)
        whole = client.do("chat", **asked)["choices"][0]["logprobs"]
        chunks = client.do("chat_stream", **asked)
        streamed = [each for chunk in chunks for choice in chunk["choices"] for each in choice.get("logprobs") or ()]
        assert [each["token"] for each in streamed] == [each["token"] for each in whole]
        # Rows of other lanes beside it change the last bits of a logit.
        for one, other in zip(streamed, whole, strict=True):
            assert one["logprob"] == pytest.approx(other["logprob"], abs=0.05)


class Completions:
    """Clients that still have the legacy route."""

    ASKED = {"model": MODEL_ID, "prompt": "A stage is", "temperature": 0}  # noqa: RUF012 - never changed

    def test_a_completion_obeys_max_tokens(self, client: Actor) -> None:
        answer = client.do("completion", **self.ASKED, max_tokens=9)
        assert answer["choices"][0]["text"]
        assert answer["choices"][0]["finish"] == "length"
        usage = answer["usage"]
        assert usage["completion"] == 9
        assert usage["prompt"] + usage["completion"] == usage["total"]

    def test_a_streamed_completion_is_the_whole_one(self, client: Actor) -> None:
        whole = client.do("completion", **self.ASKED, max_tokens=24)["choices"][0]["text"]
        chunks = client.do("completion_stream", **self.ASKED, max_tokens=24)
        assert text_of(chunks) == whole
        assert len([chunk for chunk in chunks if text_of([chunk])]) > 1

    def test_a_completion_obeys_stop(self, client: Actor) -> None:
        whole = client.do("completion", **self.ASKED, max_tokens=24)["choices"][0]["text"]
        word = whole.split()[3]
        stopped = client.do("completion", **self.ASKED, max_tokens=24, stop=[word])["choices"][0]
        assert (stopped["text"], stopped["finish"]) == (whole.partition(word)[0], "stop")


class LegacyRoute(Completions):
    """Clients that pass the legacy route's fields through."""

    def test_lists_of_prompts_get_n_choices_each_in_order(self, client: Actor) -> None:
        asked = {**self.ASKED, "prompt": ["A stage is", "A node is"], "n": 2, "max_tokens": 6}
        choices = client.do("completion", **asked)["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
        single = [client.do("completion", **{**asked, "prompt": each, "n": 1}) for each in asked["prompt"]]
        assert [choices[0]["text"], choices[2]["text"]] == [each["choices"][0]["text"] for each in single]

    def test_echo_repeats_the_prompt(self, client: Actor) -> None:
        plain = client.do("completion", **self.ASKED, max_tokens=6)["choices"][0]["text"]
        echoed = client.do("completion", **self.ASKED, max_tokens=6, echo=True)["choices"][0]["text"]
        assert echoed == self.ASKED["prompt"] + plain

    def test_legacy_logprobs_have_the_legacy_shape(self, client: Actor) -> None:
        choice = client.do("completion", **self.ASKED, max_tokens=6, logprobs=2)["choices"][0]
        found = choice["logprobs"]
        assert "".join(found["tokens"]) == choice["text"]
        assert found["text_offset"] == [
            sum(len(token) for token in found["tokens"][:index]) for index in range(len(found["tokens"]))
        ]
        for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
            assert top[token] == logprob == max(top.values())

    def test_echo_with_logprobs_scores_the_prompt(self, client: Actor) -> None:
        answer = client.do("completion", **self.ASKED, max_tokens=1, logprobs=1, echo=True)
        choice = answer["choices"][0]
        found = choice["logprobs"]
        assert "".join(found["tokens"]) == choice["text"]
        assert found["token_logprobs"][0] is None
        assert all(logprob < 0 for logprob in found["token_logprobs"][1:])
        assert len(found["tokens"]) == answer["usage"]["prompt"] + 1
        assert found["text_offset"] == [
            sum(len(token) for token in found["tokens"][:index]) for index in range(len(found["tokens"]))
        ]

    def test_a_streamed_scored_prompt_is_the_whole_one(self, client: Actor) -> None:
        asked = {**self.ASKED, "max_tokens": 3, "logprobs": 1, "echo": True}
        whole = client.do("completion", **asked)["choices"][0]
        chunks = client.do("completion_stream", **asked)
        assert text_of(chunks) == whole["text"]

    def test_with_echo_no_new_token_may_be_asked_for(self, client: Actor) -> None:
        answer = client.do("completion", **self.ASKED, max_tokens=0, logprobs=1, echo=True)
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish"], answer["usage"]["completion"]) == ("A stage is", "length", 0)
        assert "".join(choice["logprobs"]["tokens"]) == "A stage is"
