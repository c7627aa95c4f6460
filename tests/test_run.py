"""`./run` on a machine where something is missing: it says what to install, exactly, and leaves nothing half-made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What any Unix has; no Python and no compiler among it.
PLAIN = ("bash", "sh", "sed", "cat", "rm", "tail", "head", "dirname", "uname", "env", "sleep", "tr")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what `./run` reads, without an environment, on a machine with nothing but plain commands."""
    for name in ("run", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in PLAIN:
        found = shutil.which(name)
        if found is not None:
            (commands / name).symlink_to(found)
    return tmp_path


def ended(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key.startswith("PIP_") or key in {"HOME", "LANG"}}
    return subprocess.run(
        [str(checkout / "run"), *arguments],
        env={**kept, "PATH": str(checkout / "commands"), **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_help_needs_nothing_installed(checkout: Path) -> None:
    done = ended(checkout, "help")
    assert done.returncode == 0
    for part in ("./run setup", "./run demo", "./run test", "MESHNODE_PIP_ARGS"):
        assert part in done.stdout
    assert not (checkout / ".venv").exists()


def test_a_missing_python_is_named_with_the_command_that_installs_it(checkout: Path) -> None:
    done = ended(checkout, "demo")
    assert done.returncode == 1
    assert "Python 3.11 or newer" in done.stderr
    assert "MESHNODE_PYTHON=" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_that_is_too_old_does_not_count(checkout: Path) -> None:
    old = checkout / "commands" / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    assert "Python 3.11 or newer" in ended(checkout, "test").stderr


@pytest.mark.e2e
def test_a_missing_compiler_is_named_with_both_ways_on(checkout: Path) -> None:
    done = ended(checkout, "setup", MESHNODE_PYTHON=sys.executable)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no C++ compiler was found" in done.stderr
    assert "Install one:" in done.stderr
    assert 'MESHNODE_PIP_ARGS="' in done.stderr
    assert not (checkout / ".venv" / "meshnode-setup").exists(), "the next start tries again"
