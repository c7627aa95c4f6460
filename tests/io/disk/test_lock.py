from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.errors import ConfigError
from meshnode.io.disk.lock import DirectoryLock, is_shared, share, turn

HOLD = """
import sys
from pathlib import Path
from meshnode.io.disk.lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_taken_directory_is_told_with_the_process_that_holds_it(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path / "lock")
    with pytest.raises(ConfigError, match=rf"process {os.getpid()}\b") as caught:
        DirectoryLock(tmp_path / "lock")
    assert "--data" in caught.value.hint
    lock.release()
    lock.release()
    DirectoryLock(tmp_path / "lock").release()


def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {child.pid}"):
            DirectoryLock(path)
        child.kill()
    DirectoryLock(path).release()


def test_processes_take_turns_whatever_their_directories(tmp_path: Path) -> None:
    waiting = """
import sys
from meshnode.io.disk.lock import turn
print("asks", flush=True)
with turn("test-turns"):
    print("has it", flush=True)
"""
    with turn("test-turns"):
        process = subprocess.Popen([sys.executable, "-c", waiting], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "asks\n"
        assert process.poll() is None
    assert process.communicate(timeout=60)[0] == "has it\n"


def test_a_child_holds_the_share_it_inherited_until_it_ends_and_does_nothing_for_it(tmp_path: Path) -> None:
    path = tmp_path / "stages.lock"
    assert not is_shared(path)
    children = []
    for _ in range(2):
        with share(path) as held:
            command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
            children.append(subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[held]))
            assert is_shared(path)
    for child in children:
        assert is_shared(path)
        child.kill()
        child.communicate()
    assert not is_shared(path)


def test_a_lock_that_cannot_be_opened_is_told_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "stages.lock"
    with pytest.raises(ConfigError, match=r"stages\.lock"), share(path):
        raise AssertionError("it was opened")
    with pytest.raises(ConfigError, match=r"stages\.lock"):
        is_shared(path)
