"""Stage processes of this node's former life: nothing is granted before the last of them is gone.

A node that is killed takes its stages along: their socket pair ends, and they exit. One that is stopped, swapped out or
stuck in native code does not notice, and holds memory that the ledger of the next life believes to be free.

Invariant: when `former_stages_gone` returns, no stage process holds a share of the lock.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import psutil
import trio

from meshnode.errors import ConfigError
from meshnode.io.disk.lock import is_shared
from meshnode.io.stage.process import MODULE

log = logging.getLogger("meshnode.stage")

LEAVE_S: Final = 3.0
"""A stage exits within 2 s of its node's end, unless something keeps it."""
KILL_S: Final = 10.0
"""The system takes back the memory of a killed process: seconds for tens of gigabytes."""
_LOOK_S: Final = 0.05


async def former_stages_gone(lock: Path) -> None:
    """Wait for them, then end those that are known as this node's own. Raises ConfigError, which names who is left."""
    if await _gone(lock, 0.0):
        return
    log.warning("stages of this node's former life still run; nothing is granted before they are gone")
    if await _gone(lock, LEAVE_S):
        return
    for process in await trio.to_thread.run_sync(_stages, lock):
        log.warning("process %d, a stage of this node's former life, is ended", process.pid)
        try:
            process.kill()
        except psutil.Error as error:
            log.warning("process %d could not be ended: %s", process.pid, error)
    if await _gone(lock, KILL_S):
        return
    left = ", ".join(str(process.pid) for process in await trio.to_thread.run_sync(_stages, lock))
    who = f"process {left}" if left else "a process that this user cannot see"
    raise ConfigError(
        f"{who} still holds {lock}: a stage of this node's former life, with memory that would be promised twice",
        "End that process, then start this node again.",
    )


async def _gone(lock: Path, within_s: float) -> bool:
    end = trio.current_time() + within_s
    while is_shared(lock):
        if trio.current_time() >= end:
            return False
        await trio.sleep(_LOOK_S)
    return True


def _stages(lock: Path) -> list[psutil.Process]:
    """Stage processes that were started with this very file."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if MODULE in words and words[-1] == str(lock):
            found.append(process)
    return found
