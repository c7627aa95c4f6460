"""`serve` and `join`: the node itself, in this terminal, with a view of what a person waits for.

The node runs in the main thread under trio; the view is a thread that asks the node's own `/api/status`, as any other
program could. Ctrl-C drains; a second one ends the process at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable

import trio

from meshnode.app.cli.failure import INTERRUPTED
from meshnode.app.cli.logs import configure
from meshnode.app.cli.view import View
from meshnode.app.clock import WakefulClock
from meshnode.app.config import Settings

# The promise is 5 s in all; what is left covers the processes' own end.
DRAIN_S = 4.5

DESCRIPTORS = 2048
"""Twice what a node may hold: 512 clients, 256 streams of members, 64 handshakes, and its children. Systems start a
process with 256 (macOS) or 1024."""

RunNode = Callable[[Settings, trio.Event], Awaitable[None]]


def run_in_foreground(settings: Settings, run: RunNode, clock: trio.abc.Clock | None = None) -> int:
    """Run a node until it ends or is interrupted; returns the exit code."""
    allow_descriptors()
    view = View(settings)
    configure(view.log_handler())
    if words := _warning(settings):
        logging.getLogger("meshnode").warning(words, settings.api_host, settings.api_port)
    code = 1
    try:
        with view:
            trio.run(_until_interrupted, settings, run, view, clock=clock or WakefulClock())
        code = INTERRUPTED if view.interrupted else 0
    finally:
        if view.stuck:
            # The node has left, and an orderly end would wait for the terminal.
            os._exit(code)
    return code


def _warning(settings: Settings) -> str:
    """What is neither authenticated nor encrypted says so at the start."""
    if settings.api_key:
        return "" if settings.api_is_local else "%s:%d: prompts and API keys cross the network unencrypted"
    if settings.insecure:
        return "--insecure: whoever reaches %s:%d may use the endpoint, and prompts cross the network unencrypted"
    return ""


def allow_descriptors() -> None:
    """Raise this process's own limit of open files as far as the system lets it, up to DESCRIPTORS."""
    try:
        import resource
    except ImportError:
        return  # Windows has no such limit on sockets
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _until_interrupted(settings: Settings, run: RunNode, view: View) -> None:
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals, stop, nursery.cancel_scope, view)
        await run(settings, stop)
        nursery.cancel_scope.cancel()


async def _watch_signals(
    stop: trio.Event,
    scope: trio.CancelScope,
    view: View,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            if stop.is_set():
                # The person means it: no draining, stages see the closed socket pair and end by themselves.
                view.close()
                sys.stderr.flush()
                os._exit(INTERRUPTED)
            view.interrupted = number == signal.SIGINT
            view.draining()
            stop.set()
            # Whatever does not drain in time is cancelled, so that leaving never hangs.
            scope.deadline = trio.current_time() + DRAIN_S
