"""A node that asks for a key: what each client's users see with a wrong one, and that the right one opens it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from meshnode.demo import EXPECTED_ANSWER
from tests.clients.actor import Actor, acting_in_node, acting_in_python
from tests.clients.contract import asking, refusal
from tests.clients.environments import node_environment, python_environment
from tests.e2e.nodes import RealMesh, RealNode, until

pytestmark = [pytest.mark.real_client]

KEY = "a-key-of-forty-characters-for-these-tests"
NEWEST = "openai-python, newest"
CLIENTS = {
    NEWEST: ("openai_python.py", "", "AuthenticationError"),
    "openai-python 1": ("openai_python.py", "openai_python_1", "AuthenticationError"),
    "langchain-openai": ("langchain_openai_chat.py", "langchain_openai", "AuthenticationError"),
    "LiteLLM": ("litellm_chat.py", "litellm", "AuthenticationError"),
    "openai-node": ("openai_node.mjs", "", "AuthenticationError"),
    "AI SDK": ("ai_sdk.mjs", "", "AI_APICallError"),
}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealNode]:
    """One node, which has the whole model."""
    folder = tmp_path_factory.mktemp("locked")
    keys = folder / "keys"
    keys.write_text(f"{KEY}\n")
    made = RealMesh(folder)
    try:
        node = made.found("one", "--context", "1024", "--api-key-file", str(keys))
        until("it answers", node.ready)
        yield node
    finally:
        made.close()


def acting(script: str, environment: str, node: RealNode, key: str) -> AbstractContextManager[Actor]:
    if script.endswith(".mjs"):
        return acting_in_node(node_environment(), script, node.url, key)
    interpreter = python_environment(environment) if environment else Path(sys.executable)
    return acting_in_python(interpreter, script, node.url, key)


@pytest.mark.parametrize(
    "name", [name if name == NEWEST else pytest.param(name, marks=pytest.mark.own_environment) for name in CLIENTS]
)
def test_a_wrong_key_raises_what_its_users_catch_and_the_right_one_opens(name: str, locked: RealNode) -> None:
    script, environment, kind = CLIENTS[name]
    with acting(script, environment, locked, "wrong") as client:
        for what in ("chat", "chat_stream"):
            refused = refusal(client, what, **asking())
            assert kind in refused.kinds, refused
            assert refused.status == 401
            assert KEY not in refused.message
    with acting(script, environment, locked, KEY) as client:
        assert client.do("chat", **asking())["choices"][0]["text"] == EXPECTED_ANSWER
