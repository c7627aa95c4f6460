"""Threads whose stack has a given size: native code that recurses as deep as its input ends one with the usual stack.

Invariant: a stack is only as much memory as was touched of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def thread_of(stack_bytes: int, name: str) -> ThreadPoolExecutor:
    """One thread that does one thing after the other; it ends when nobody holds it any more."""
    pool = ThreadPoolExecutor(1, name)
    # Python knows one size for all threads that begin: this one begins with its first work.
    before = threading.stack_size(stack_bytes)
    try:
        pool.submit(lambda: None)
    finally:
        threading.stack_size(before)
    return pool


def on_stack(stack_bytes: int, work: Callable[[], T]) -> T:
    """What `work` gives, done on a thread for its stack only: the caller waits. What it raises is raised."""
    with thread_of(stack_bytes, "stack") as pool:
        return pool.submit(work).result()
