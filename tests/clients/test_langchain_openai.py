"""langchain-openai, which raises what openai-python raises, or its own subclass of it. It lists no models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from meshnode.demo import ANSWERS
from tests.clients import contract
from tests.clients.actor import Actor, acting_in_python
from tests.clients.contract import MODEL_ID, TOO_LONG, asking, refusal
from tests.clients.environments import python_environment
from tests.e2e.nodes import RealMesh

pytestmark = [pytest.mark.real_client, pytest.mark.own_environment]


@pytest.fixture(scope="module")
def client(mesh: RealMesh) -> Iterator[Actor]:
    with acting_in_python(
        python_environment("langchain_openai"), "langchain_openai_chat.py", mesh.nodes[2].url
    ) as actor:
        yield actor


class TestLangChainOpenAI(
    contract.Chat, contract.Structured, contract.Logprobs, contract.StreamedLogprobs, contract.Completions
):
    def test_several_choices_come_of_one_call(self, client: Actor) -> None:
        texts = client.do("several", **asking("A node", temperature=1.9, max_tokens=20, seed=11, n=3))
        assert len(set(texts)) == 3

    def test_a_chain_over_a_list_gets_every_answer(self, client: Actor) -> None:
        questions = list(ANSWERS)[:4]
        found = client.do("chain", model=MODEL_ID, questions=questions)
        assert found == [ANSWERS[question] for question in questions]

    def test_a_prompt_beyond_the_context_is_an_overflow_to_its_agents(self, client: Actor) -> None:
        assert "ContextOverflowError" in refusal(client, "chat", **asking(TOO_LONG)).kinds
