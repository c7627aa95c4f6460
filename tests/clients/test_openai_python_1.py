"""openai-python 1.x: the major that most installed programs still have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.actor import Actor, acting_in_python
from tests.clients.environments import python_environment
from tests.clients.test_openai_python import Everything
from tests.e2e.nodes import RealMesh

pytestmark = [pytest.mark.real_client, pytest.mark.own_environment]


@pytest.fixture(scope="module")
def client(mesh: RealMesh) -> Iterator[Actor]:
    with acting_in_python(python_environment("openai_python_1"), "openai_python.py", mesh.nodes[0].url) as actor:
        yield actor


class TestOpenAIPython1(Everything):
    def test_it_is_the_first_major(self, client: Actor) -> None:
        assert client.do("version").startswith("1.")
