"""The two commands of the README, in a fresh clone with nothing prepared but Python, a compiler and pip's cache."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Compiling llama.cpp without a cached wheel on two busy cores, and as much again.
PATIENCE_S = 1500

pytestmark = [pytest.mark.e2e, pytest.mark.native]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("clone") / "meshnode"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


def ended(clone: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    return subprocess.run(
        ["./run", *command], cwd=clone, env=environment, check=False, capture_output=True, text=True, timeout=PATIENCE_S
    )


def test_both_commands_work_in_a_clean_clone(clone: Path) -> None:
    first = ended(clone, "demo", "--exit")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "word for word" in first.stdout
    # One file instead of all tests: this one would otherwise start itself.
    second = ended(clone, "test", "tests/app/test_config.py")
    assert second.returncode == 0, second.stdout + second.stderr
    assert " passed in " in second.stdout.splitlines()[-1]
    assert "updating pip" not in second.stderr, "a second start sets nothing up"
