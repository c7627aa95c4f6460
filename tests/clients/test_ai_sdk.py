"""The AI SDK with @ai-sdk/openai-compatible. It has neither a list of models nor several choices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients import contract
from tests.clients.actor import Actor, acting_in_node
from tests.clients.environments import node_environment
from tests.e2e.nodes import RealMesh

pytestmark = [pytest.mark.real_client, pytest.mark.own_environment]


@pytest.fixture(scope="module")
def client(mesh: RealMesh) -> Iterator[Actor]:
    with acting_in_node(node_environment(), "ai_sdk.mjs", mesh.nodes[1].url) as actor:
        yield actor


class TestAISDK(contract.Chat, contract.Completions):
    # The one class that it has for whatever a server refuses.
    NOT_FOUND = BAD_REQUEST = "AI_APICallError"
