"""What a node does about stages of its former life: real stage processes that do not leave by themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from meshnode.app import former
from meshnode.app.former import former_stages_gone
from meshnode.errors import ConfigError
from meshnode.io.disk.lock import is_shared, share
from meshnode.io.stage.process import StageProcess
from tests.io.stage.neighbour import PATIENCE_S


async def stage(nursery: trio.Nursery, lock: Path) -> StageProcess:
    with share(lock) as held:
        return await StageProcess.spawn(nursery, "stage 0", threads=1, on_event=print, lock=(lock, held))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is to happen in the wait has happened before."""
    monkeypatch.setattr(former, "LEAVE_S", 0.1)


async def test_where_nobody_is_left_nothing_is_waited_for(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE_S):
        await former_stages_gone(tmp_path / "stages.lock")


async def test_a_stage_that_is_stopped_is_ended_and_one_of_another_directory_is_not(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    lock, elsewhere = tmp_path / "stages.lock", tmp_path / "other.lock"
    old, other = await stage(nursery, lock), await stage(nursery, elsewhere)
    os.kill(old.pid, signal.SIGSTOP)
    assert is_shared(lock)
    with trio.fail_after(PATIENCE_S):
        await former_stages_gone(lock)
        await old.wait_lost()
    assert old.exit_code == -signal.SIGKILL
    assert not is_shared(lock)
    assert other.exit_code is None
    assert is_shared(elsewhere)
    await other.aclose()


async def test_a_holder_that_is_no_stage_is_left_alone_and_the_person_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(former, "KILL_S", 0.1)
    lock = tmp_path / "stages.lock"
    with share(lock) as held:
        command = [sys.executable, "-c", "import sys; sys.stdin.read()", str(lock)]
        stranger = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, pass_fds=[held])
    with pytest.raises(ConfigError, match=r"still holds .*stages\.lock") as told:
        await former_stages_gone(lock)
    assert told.value.hint
    assert stranger.poll() is None
    stranger.kill()
    await stranger.wait()
    assert stranger.stdin is not None
    await stranger.stdin.aclose()
