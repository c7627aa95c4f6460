"""openai-python, the newest: it is among the project's own tools, so these run with every other test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnode.demo import EXPECTED_ANSWER
from tests.clients import contract
from tests.clients.actor import Actor, acting_in_python
from tests.clients.contract import LASTING, all_lanes_free, asking, refusal
from tests.e2e.nodes import RealMesh

pytestmark = [pytest.mark.real_client, pytest.mark.e2e]


@pytest.fixture(scope="module")
def client(mesh: RealMesh) -> Iterator[Actor]:
    with acting_in_python(Path(sys.executable), "openai_python.py", mesh.nodes[1].url) as actor:
        yield actor


class Everything(
    contract.Models,
    contract.Chat,
    contract.Chunks,
    contract.Choices,
    contract.Patience,
    contract.Responses,
    contract.Structured,
    contract.Logprobs,
    contract.StreamedLogprobs,
    contract.LegacyRoute,
):
    """What this client's users use, for any of its majors."""

    def test_a_model_is_found_by_its_id(self, client: Actor) -> None:
        assert client.do("model", id=contract.MODEL_ID) == contract.MODEL_ID
        assert "NotFoundError" in refusal(client, "model", id="nothing").kinds

    def test_errors_carry_the_codes_that_programs_look_at(self, client: Actor) -> None:
        unknown = refusal(client, "chat", **{**asking(), "model": "nothing"})
        assert (unknown.status, unknown.code) == (404, "model_not_found")
        long = refusal(client, "chat", **asking(contract.TOO_LONG))
        assert (long.status, long.code) == (400, "context_length_exceeded")

    def test_its_stream_helper_puts_the_answer_together(self, client: Actor) -> None:
        found = client.do("chat_helper", **asking())
        assert found["whole"]["choices"][0]["text"] == EXPECTED_ANSWER
        assert found["whole"]["choices"][0]["finish"] == "stop"
        assert found["kinds"].count("chunk") > 10

    def test_newer_and_unknown_fields_are_taken(self, client: Actor) -> None:
        more = {
            "max_completion_tokens": 5,
            "store": False,
            "user": "me",
            "metadata": {"a": "b"},
            "service_tier": "auto",
        }
        answer = client.do("chat", **asking(), **more, extra_body={"top_k": 40, "no_such_field": 1})
        assert answer["usage"]["completion"] == 5

    def test_a_client_that_does_not_wait_for_a_whole_answer_frees_its_lane(self, client: Actor, mesh: RealMesh) -> None:
        asked = asking(timeout=0.2, **LASTING)
        assert self.TIMEOUT in refusal(client, "impatient", **asked).kinds
        all_lanes_free(mesh)
        assert client.do("chat", **asking())["choices"][0]["text"] == EXPECTED_ANSWER


class TestOpenAIPython(Everything):
    def test_it_is_the_newest_major(self, client: Actor) -> None:
        assert int(client.do("version").split(".")[0]) >= 3
