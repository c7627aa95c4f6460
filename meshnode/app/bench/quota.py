"""A part of a processor for some processes: a control group with a quota, where this user may make one.

Linux only, and mostly root's: where it is not possible, `available` says so and nothing is made slower in its place.
Stopping and continuing a process by signals would look like a quota and is none: native threads are caught anywhere.

Invariant: every group that was made is removed when `close` returns, if no process lives in it any more.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

ROOT: Final = Path("/sys/fs/cgroup")
SHARE_US: Final = 1_000
"""Granted in every period, the kernel's minimum. With long periods a stage that rests between two tokens would never
feel its quota; the kernel charges by its tick (1 to 4 ms) in any case, so that steps below some 10 ms run too fast."""


class Quotas:
    """Groups of this process, by name."""

    def __init__(self, root: Path = ROOT) -> None:
        self._parent = _parent(root)
        self._made: dict[int, Path] = {}

    @property
    def available(self) -> bool:
        """Whether a quota can be set here."""
        return self._group(50) is not None

    def put(self, pid: int, percent: int) -> None:
        """Give the process, and those it starts from now on, `percent` of one processor. Raises OSError."""
        if percent >= 100:
            return
        group = self._group(percent)
        if group is None:
            raise OSError("no quota can be set here")
        (group / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        """Remove what was made."""
        for path in self._made.values():
            try:
                path.rmdir()
            except OSError:
                continue
        self._made.clear()

    def _group(self, percent: int) -> Path | None:
        if percent not in self._made:
            if self._parent is None:
                return None
            path = self._parent / f"meshnode-bench-{os.getpid()}-{percent}"
            period = SHARE_US * 100 // percent
            try:
                path.mkdir()
                self._made[percent] = path
                if (path / "cpu.max").exists():
                    (path / "cpu.max").write_text(f"{SHARE_US} {period}")
                else:
                    (path / "cpu.cfs_period_us").write_text(str(period))
                    (path / "cpu.cfs_quota_us").write_text(str(SHARE_US))
            except OSError:
                return None
        return self._made[percent]


def _parent(root: Path) -> Path | None:
    """The group this process is in, as far as groups can be made in it: version 1 (own hierarchy) or 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            return root / controllers / path.lstrip("/")
    unified = next((line.split(":", 2)[2] for line in lines if line.startswith("0::")), None)
    return None if unified is None else root / unified.lstrip("/")
