"""openai-node, the official client of JavaScript."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.actor import Actor, acting_in_node
from tests.clients.environments import node_environment
from tests.clients.test_openai_python import Everything
from tests.e2e.nodes import RealMesh

pytestmark = [pytest.mark.real_client, pytest.mark.own_environment]


@pytest.fixture(scope="module")
def client(mesh: RealMesh) -> Iterator[Actor]:
    with acting_in_node(node_environment(), "openai_node.mjs", mesh.nodes[2].url) as actor:
        yield actor


class TestOpenAINode(Everything):
    TIMEOUT = "APIConnectionTimeoutError"
