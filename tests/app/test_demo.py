"""The demonstration is the shortest whole path: real nodes, real invites, a real split, a known answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.app.admin import PlanRequest
from meshnode.app.cli.planning import plan_here
from meshnode.app.config import Settings
from meshnode.app.demo import CONTEXT, GRAIN_BYTES, NAMES, memory_limit
from meshnode.demo import EXPECTED_ANSWER, MODEL, QUESTION
from meshnode.io.llama.footprint import read_footprint

# Far above the 20 s that it may take, for a machine that does something else as well; a hang fails instead of stalling.
PATIENCE_S = 120


def test_the_limit_needs_all_three_nodes() -> None:
    request = PlanRequest(footprint=read_footprint(MODEL), context=CONTEXT, lanes=4)
    settings = Settings(data=Path())
    limit = str(memory_limit(len(NAMES)))
    whole = plan_here(request, [limit] * 3, settings).plan
    assert whole is not None
    assert len(whole.stages) == len(NAMES)
    assert plan_here(request, [limit] * 2, settings).plan is None
    assert plan_here(request, [str(int(limit) - GRAIN_BYTES)] * 3, settings).plan is None


@pytest.mark.e2e
@pytest.mark.native
def test_three_nodes_answer_with_the_unsplit_models_words() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "meshnode.app.cli", "demo", "--exit"],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={key: value for key, value in os.environ.items() if not key.startswith("MESHNODE_")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for part in (QUESTION, EXPECTED_ANSWER, "tokens per second", "word for word"):
        assert part in done.stdout
    for name in NAMES:
        assert f"on {name}: layers" in done.stdout
    assert done.stderr == ""


@pytest.mark.e2e
@pytest.mark.native
def test_the_demonstration_stays_up_until_ctrl_c_and_leaves_nothing_running() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "meshnode.app.cli", "demo"], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as demo:
        assert demo.stdout is not None
        heard = ""
        for line in demo.stdout:
            heard += line
            if "Ctrl-C ends" in line:
                os.killpg(demo.pid, signal.SIGINT)  # as a terminal does: to everybody in the foreground
        assert "Ctrl-C ends" in heard, heard
        assert demo.wait(PATIENCE_S) == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(demo.pid, 0)
