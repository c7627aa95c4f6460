"""LiteLLM with the providers `openai/` and `text-completion-openai/`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients import contract
from tests.clients.actor import Actor, acting_in_python
from tests.clients.contract import TOO_LONG, asking, refusal
from tests.clients.environments import python_environment
from tests.e2e.nodes import RealMesh

pytestmark = [pytest.mark.real_client, pytest.mark.own_environment]


@pytest.fixture(scope="module")
def client(mesh: RealMesh) -> Iterator[Actor]:
    with acting_in_python(python_environment("litellm"), "litellm_chat.py", mesh.nodes[1].url) as actor:
        yield actor


class TestLiteLLM(contract.Models, contract.Chat, contract.Choices, contract.Logprobs, contract.Completions):
    def test_a_prompt_beyond_the_context_makes_its_gateway_fall_back(self, client: Actor) -> None:
        assert "ContextWindowExceededError" in refusal(client, "chat", **asking(TOO_LONG)).kinds
