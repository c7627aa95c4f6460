"""Work beside what serves: a new stage starts and loads where another one hands out tokens.

A thread whose priority was lowered cannot raise it again without rights that a user lacks, and the threads of native
code keep the priority of the one that made them. So such work gets a thread of its own, which ends with it, and what
computes later has the usual priority.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

NICENESS: Final = 10
"""Steps: a tenth of a core where all are busy, all of it where they are not. At 19 it would be a hundredth, and to load
40 GB takes 20 s of a core."""
_LEAST: Final = 19


def aside(job: Callable[[], object]) -> None:
    """Run `job` in a thread that gives way to whatever else computes on this machine, and wait until it has ended.

    What it raises is raised here.
    """
    with ThreadPoolExecutor(1, "stage-aside", _give_way) as thread:
        thread.submit(job).result()


def _give_way() -> None:
    """Where threads have a priority of their own; elsewhere it would be the whole process's, for good."""
    if sys.platform == "linux":
        # 0: the calling thread.
        os.setpriority(os.PRIO_PROCESS, 0, min(os.getpriority(os.PRIO_PROCESS, 0) + NICENESS, _LEAST))
