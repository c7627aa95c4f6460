from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.errors import ConfigError
from meshnode.io.disk.lock import DirectoryLock, turn

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
