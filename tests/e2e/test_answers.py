"""Three real nodes, a model that none of them holds alone, and the official client."""

from __future__ import annotations

import concurrent.futures

import httpx
import openai
import pytest

from meshnode.demo import ANSWERS, EXPECTED_ANSWER, LONG_QUESTION, QUESTION
from tests.e2e.nodes import RealMesh, run_cli, until

pytestmark = pytest.mark.e2e

MODEL_ID = "meshnode-demo"


def ask(client: openai.OpenAI, question: str) -> str:
    answer = client.chat.completions.create(
        model=MODEL_ID, messages=[{"role": "user", "content": question}], temperature=0
    )
    return answer.choices[0].message.content or ""


def test_the_plan_spreads_the_layers_over_all_three_nodes(mesh: RealMesh) -> None:
    stages = mesh.nodes[0].serving()["stages"]
    assert {stage["name"] for stage in stages} == {"one", "two", "three"}
    assert stages[0]["first"] == 0
    assert [stage["last"] for stage in stages[:-1]] == [stage["first"] for stage in stages[1:]]


@pytest.mark.parametrize("node", [0, 1, 2])
def test_every_node_answers_with_the_words_of_the_unsplit_model(mesh: RealMesh, node: int) -> None:
    assert ask(mesh.nodes[node].client(), QUESTION) == EXPECTED_ANSWER


@pytest.mark.parametrize("node", [0, 1])
def test_a_stream_gives_the_same_words_piece_by_piece(mesh: RealMesh, node: int) -> None:
    stream = (
        mesh.nodes[node]
        .client()
        .chat.completions.create(
            model=MODEL_ID,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == EXPECTED_ANSWER
    assert len(pieces) > 10
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 10


def test_eight_questions_at_once_get_eight_right_answers(mesh: RealMesh) -> None:
    questions = list(ANSWERS)[:8]
    clients = [node.client() for node in mesh.nodes]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pair: ask(clients[pair[0] % 3], pair[1]), enumerate(questions)))
    assert answers == [ANSWERS[question] for question in questions]


def test_completions_obey_stop_and_max_tokens(mesh: RealMesh) -> None:
    client = mesh.nodes[1].client()
    one = client.completions.create(model=MODEL_ID, prompt="A stage is", max_tokens=1, temperature=0)
    assert one.choices[0].finish_reason == "length"
    assert one.usage is not None
    assert one.usage.completion_tokens == 1
    whole = ask(client, LONG_QUESTION)
    word = whole.split()[5]
    stopped = client.chat.completions.create(
        model=MODEL_ID, messages=[{"role": "user", "content": LONG_QUESTION}], temperature=0, stop=word
    )
    assert stopped.choices[0].message.content == whole[: whole.index(word)]
    assert stopped.choices[0].finish_reason == "stop"


def test_a_seed_repeats_a_sampled_answer(mesh: RealMesh) -> None:
    def sampled(node: int) -> str:
        answer = (
            mesh.nodes[node]
            .client()
            .completions.create(model=MODEL_ID, prompt="A node", max_tokens=24, temperature=1.5, top_p=0.95, seed=7)
        )
        return answer.choices[0].text

    assert sampled(0) == sampled(2)


def test_every_node_lists_the_model_and_says_where_it_is(mesh: RealMesh) -> None:
    for node in mesh.nodes:
        assert [model.id for model in node.client().models.list()] == [MODEL_ID]
        assert node.client().models.retrieve(MODEL_ID).id == MODEL_ID
        assert httpx.get(f"{node.url}/health").status_code == 200


@pytest.mark.parametrize("node", [0, 1])
def test_wrong_requests_get_the_errors_of_the_original(mesh: RealMesh, node: int) -> None:
    client = mesh.nodes[node].client()
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="nothing", messages=[{"role": "user", "content": "x"}])
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model=MODEL_ID,
            messages=[{"role": "user", "content": "x"}],
            temperature="hot",  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("node", [0, 2])
def test_a_hundred_thousand_repeated_characters_are_refused_and_the_node_lives_on(mesh: RealMesh, node: int) -> None:
    client = mesh.nodes[node].client()
    with pytest.raises(openai.APIStatusError) as refused:
        ask(client, "a" * 100_000)
    assert refused.value.status_code in (400, 500)
    assert ask(client, QUESTION) == EXPECTED_ANSWER


def test_a_client_that_goes_away_frees_its_lane(mesh: RealMesh) -> None:
    for node in (mesh.nodes[0], mesh.nodes[1]):
        for _ in range(6):
            body = {"model": MODEL_ID, "prompt": "A", "max_tokens": 900, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{node.url}/v1/completions", json=body, timeout=60) as response:
                next(response.iter_lines())
    health = f"{mesh.nodes[0].url}/health"
    until("all lanes are free", lambda: httpx.get(health).json()["lanes_busy"] == 0)
    assert ask(mesh.nodes[0].client(), QUESTION) == EXPECTED_ANSWER


def test_status_and_plan_are_shown_by_the_command_line(mesh: RealMesh) -> None:
    node = mesh.nodes[1]
    shown = run_cli("status", "--data", str(node.data))
    assert shown.returncode == 0, shown.stderr
    for word in ("meshnode-demo", "serving", "one", "two", "three"):
        assert word in shown.stdout
    assert '"deployments"' in run_cli("status", "--json", "--data", str(node.data)).stdout


def test_no_prompt_key_or_invite_is_in_any_log(mesh: RealMesh) -> None:
    for node in mesh.nodes:
        ask(node.client(), "Xylophone zebra?")
        words = node.words()
        assert "Xylophone" not in words
        assert (node.data / "api-token").read_text().strip() not in words
        assert "PRIVATE KEY" not in words
