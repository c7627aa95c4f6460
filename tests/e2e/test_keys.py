"""API keys on two real nodes, each with its own: a key opens the node it was given to and travels nowhere."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from meshnode.demo import EXPECTED_ANSWER, QUESTION
from tests.e2e.nodes import WAIT_S, RealMesh, RealNode, run_cli, until

pytestmark = pytest.mark.e2e

KEYS = ("a-key-of-the-first-node", "a-key-of-the-second-node")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealMesh]:
    folder = tmp_path_factory.mktemp("keyed")
    kept = folder / "keys"
    kept.write_text(f"# one key\n{KEYS[0]}\n")
    made = RealMesh(folder)
    try:
        made.found("one", "--context", "1024", "--api-key-file", str(kept), "--cors-origins", "https://chat.example")
        made.join("two", "--api-key", KEYS[1], "--requests-per-key", "8")
        for node in made.nodes:
            until(f"{node.name} answers", node.ready)
        yield made
    finally:
        made.close()


def asked(node: RealNode, key: str) -> str:
    with openai.OpenAI(base_url=f"{node.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S) as client:
        answer = client.chat.completions.create(
            model="meshnode-demo", messages=[{"role": "user", "content": QUESTION}], temperature=0
        )
    return answer.choices[0].message.content or ""


@pytest.mark.parametrize("number", [0, 1])
def test_a_key_opens_its_own_node_only_and_the_request_is_passed_on_without_it(keyed: RealMesh, number: int) -> None:
    node = keyed.nodes[number]
    assert asked(node, KEYS[number]) == EXPECTED_ANSWER
    for wrong in (KEYS[1 - number], "nothing"):
        with pytest.raises(openai.AuthenticationError):
            asked(node, wrong)


def test_r84_what_one_key_asked_is_computed_again_for_another(keyed: RealMesh) -> None:
    body = {"messages": [{"role": "user", "content": "What does a stage of this mesh hold?"}], "max_tokens": 2}
    held = []
    for number in (0, 0, 1, 1):
        headers = {"authorization": f"Bearer {KEYS[number]}"}
        url = f"{keyed.nodes[number].url}/v1/chat/completions"
        answer = httpx.post(url, json=body, headers=headers, timeout=WAIT_S).json()
        held.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert [bool(tokens) for tokens in held] == [False, True, False, True]


def test_pages_and_the_command_line_are_let_in_as_before(keyed: RealMesh) -> None:
    node = keyed.nodes[0]
    page = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    assert httpx.options(f"{node.url}/v1/models", headers=page).headers["access-control-allow-origin"] == page["origin"]
    assert run_cli("status", "--data", str(node.data)).returncode == 0


def test_no_key_is_said_or_logged(keyed: RealMesh) -> None:
    for node in keyed.nodes:
        shown = run_cli("status", "--json", "--data", str(node.data)).stdout
        for key in KEYS:
            assert key not in node.words()
            assert key not in shown
