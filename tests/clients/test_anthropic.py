"""anthropic-python, for agents that ask for `messages`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from meshnode.demo import ANSWERS, EXPECTED_ANSWER, LONG_QUESTION, QUESTION
from tests.clients.actor import Actor, acting_in_python
from tests.clients.contract import MODEL_ID, TOO_LONG, WORD, all_lanes_free, refusal
from tests.clients.environments import python_environment
from tests.e2e.nodes import RealMesh

pytestmark = [pytest.mark.real_client, pytest.mark.own_environment]


@pytest.fixture(scope="module")
def client(mesh: RealMesh) -> Iterator[Actor]:
    with acting_in_python(python_environment("anthropic"), "anthropic_python.py", mesh.nodes[1].url) as actor:
        yield actor


def asking(question: str = QUESTION, **more: object) -> dict[str, object]:
    # Its newest major has no name for the temperature.
    greedy = {"extra_body": {"temperature": 0}}
    return {"model": MODEL_ID, "max_tokens": 256, "messages": [{"role": "user", "content": question}], **greedy, **more}


def test_a_message_is_answered_with_its_reason_to_stop_and_usage(client: Actor) -> None:
    answer = client.do("message", **asking())
    assert (answer["text"], answer["stop"]) == (EXPECTED_ANSWER, "end_turn")
    assert answer["usage"][0] == client.do("count", model=MODEL_ID, messages=asking()["messages"])
    assert answer["usage"][1] > 10


def test_a_streamed_message_is_the_whole_one_in_its_events(client: Actor) -> None:
    found, whole = client.do("message_stream", **asking()), client.do("message", **asking())
    assert found["text"] == EXPECTED_ANSWER
    assert (found["stop"], found["usage"]) == (whole["stop"], whole["usage"])
    assert (found["kinds"][0], found["kinds"][-1]) == ("message_start", "message_stop")
    assert found["kinds"].count("text") > 10


def test_stop_sequences_and_max_tokens_end_a_message(client: Actor) -> None:
    stopped = client.do("message", **asking(LONG_QUESTION, stop_sequences=[WORD]))
    wanted = ANSWERS[LONG_QUESTION].partition(WORD)[0]
    assert (stopped["text"], stopped["stop"], stopped["at"]) == (wanted, "stop_sequence", WORD)
    cut = client.do("message", **asking(max_tokens=5))
    assert (cut["stop"], cut["usage"][1]) == ("max_tokens", 5)


def test_errors_are_those_that_its_users_catch(client: Actor) -> None:
    assert "NotFoundError" in refusal(client, "message", **{**asking(), "model": "nothing"}).kinds
    assert "BadRequestError" in refusal(client, "message", **asking(TOO_LONG)).kinds
    assert "BadRequestError" in refusal(client, "message_stream", **asking(TOO_LONG)).kinds


def test_a_client_that_leaves_in_mid_stream_frees_its_lane(client: Actor, mesh: RealMesh) -> None:
    for _ in range(6):
        assert client.do("leave", **asking(LONG_QUESTION, max_tokens=1500))
    all_lanes_free(mesh)
