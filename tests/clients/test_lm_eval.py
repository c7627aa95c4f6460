"""lm-evaluation-harness with its API models, on a small task made of the demonstration model's own answers.

Its command line runs as its users run it; the tasks are written here, so that nothing is fetched but the harness.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from meshnode.demo import ANSWERS
from tests.clients.contract import MODEL_ID
from tests.clients.environments import python_environment
from tests.e2e.likelihood import log_likelihood, one_machine
from tests.e2e.nodes import RealMesh

pytestmark = [pytest.mark.real_client, pytest.mark.own_environment, pytest.mark.native]

RUN_S = 300
"""Importing the harness takes 10 s here, the questions a second each at worst; a hang still ends."""
QUESTIONS = list(ANSWERS)[:12]
PROMPT = "<|user|>{{question}}<|end|><|assistant|>"
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: '{text}'
"""
GENERATE = """
output_type: generate_until
doc_to_target: answer
generation_kwargs: {until: ['<|end|>'], max_gen_toks: 200, temperature: 0}
metric_list: [{metric: exact_match}]
"""
CHOOSE = """
output_type: multiple_choice
target_delimiter: ''
doc_to_choice: choices
doc_to_target: right
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.json"
    rows = []
    for number, question in enumerate(QUESTIONS):
        others = [ANSWERS[QUESTIONS[(number + step) % len(QUESTIONS)]] for step in (1, 2)]
        choices = [*others, ANSWERS[question]]
        rows.append({"question": question, "answer": ANSWERS[question], "choices": choices, "right": 2})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text, kind in (
        ("answers", PROMPT, GENERATE),
        ("chat_answers", "{{question}}", GENERATE),
        ("choices", PROMPT, CHOOSE),
    ):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, text=text) + kind)
    return folder


def evaluate(tasks: Path, task: str, model: str, url: str, *more: str, **arguments: Any) -> list[dict[str, Any]]:
    """The samples of one run, in the order of the questions."""
    written = tasks / f"{task}-{model}"
    given = {"model": MODEL_ID, "base_url": url, "max_retries": 1, "max_length": 2048, **arguments}
    command = [
        str(python_environment("lm_eval")), "-m", "lm_eval", "run", "--model", model, "--tasks", task,
        "--model_args", ",".join(f"{name}={value}" for name, value in given.items()),
        "--include_path", str(tasks), "--output_path", str(written), "--log_samples", *more,
    ]  # fmt: skip
    kept = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    own = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tasks / "cache"),
        "OPENAI_API_KEY": "unused",
    }
    done = subprocess.run(
        command, env={**kept, **own}, cwd=tasks, capture_output=True, text=True, timeout=RUN_S, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = next(written.rglob("samples_*.jsonl")).read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize("concurrent", [1, 4])
def test_local_completions_generates_every_answer_word_for_word(mesh: RealMesh, tasks: Path, concurrent: int) -> None:
    url = f"{mesh.nodes[1].url}/v1/completions"
    samples = evaluate(tasks, "answers", "local-completions", url, tokenizer_backend="None", num_concurrent=concurrent)
    assert [sample["resps"][0][0] for sample in samples] == [ANSWERS[question] for question in QUESTIONS]
    assert all(sample["exact_match"] == 1 for sample in samples)


def test_local_chat_completions_generates_every_answer_word_for_word(mesh: RealMesh, tasks: Path) -> None:
    url = f"{mesh.nodes[2].url}/v1/chat/completions"
    samples = evaluate(tasks, "chat_answers", "local-chat-completions", url, "--apply_chat_template")
    assert [sample["resps"][0][0] for sample in samples] == [ANSWERS[question] for question in QUESTIONS]
    assert all(sample["exact_match"] == 1 for sample in samples)


@pytest.fixture(scope="module")
def plain() -> Iterator[llama_cpp.Llama]:
    with one_machine() as model:
        yield model


def test_local_completions_sees_the_log_likelihoods_of_one_machine(
    mesh: RealMesh, tasks: Path, plain: llama_cpp.Llama
) -> None:
    samples = evaluate(tasks, "choices", "local-completions", f"{mesh.nodes[1].url}/v1/completions")
    assert [sample["acc"] for sample in samples] == [1.0] * len(QUESTIONS)
    for question, sample in zip(QUESTIONS, samples, strict=True):
        prompt = PROMPT.replace("{{question}}", question)
        for choice, ((seen, greedy),) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            wanted, best = log_likelihood(plain, prompt, choice)
            # Activations in f16 and a quantized KV cache move each of some 30 tokens a little.
            assert float(seen) == pytest.approx(wanted, rel=0.02, abs=0.05)
            assert greedy in (best, str(best))
