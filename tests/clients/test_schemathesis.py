"""Requests generated from a schema of OpenAI's API, right and wrong ones: no 5xx, and answers as the schema says."""

from __future__ import annotations

import collections
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.clients.actor import ACTORS
from tests.clients.contract import asking
from tests.clients.environments import HERE, python_environment
from tests.e2e.nodes import RealMesh

pytestmark = [pytest.mark.real_client, pytest.mark.own_environment]

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)
EXAMPLES = 150
"""For each of 17 routes; with the cases that cover each keyword of the schema some 4,000 requests, 2 minutes."""
RUN_S = 600


def test_no_generated_request_gets_a_5xx_and_every_answer_is_as_the_schema_says(mesh: RealMesh, tmp_path: Path) -> None:
    report = tmp_path / "report.ndjson"
    command = [
        str(python_environment("schemathesis").parent / "schemathesis"), "run", str(HERE / "openapi.json"),
        "--url", mesh.nodes[1].url, "--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing",
        "--max-examples", str(EXAMPLES), "--generation-deterministic", "--continue-on-failure", "--no-color",
        "--request-timeout", "60", "--report-ndjson-path", str(report),
    ]  # fmt: skip
    own = {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(ACTORS)}
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **own}, capture_output=True, text=True, timeout=RUN_S, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    statuses = collections.Counter(re.findall(r'"status_code":(\d+)', report.read_text()))
    assert sum(statuses.values()) > 1000
    assert statuses["200"] > 300, statuses
    assert statuses["400"] > 300, statuses
    assert mesh.nodes[1].client().chat.completions.create(**asking()).choices[0].finish_reason == "stop"
