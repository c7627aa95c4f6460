"""What a person sees of a node in the foreground: a live picture in a terminal, plain lines anywhere else.

Invariant: only the view's own thread writes. A terminal that takes nothing (Ctrl-S, a pager) stops that thread and what
is shown, never the node.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from meshnode.app.admin import InviteRequest
from meshnode.app.cli.control import Control, running_node
from meshnode.app.cli.narration import Narrator, curl_line, ready_line
from meshnode.app.cli.tables import progress_words, status_view
from meshnode.app.config import Settings
from meshnode.core.node.status import NodeStatus
from meshnode.errors import MeshError

# Fast enough for a progress bar; and when nothing moves, slow enough to stay out of the way of the head's tokens, with
# which a look shares the interpreter (3 ms each).
MOVING_S = 0.5
STEADY_S = 3.0
INVITE_LIFE_S = 24 * 3600
CLOSE_S = 1.0
"""For what still has to be written at the end; a screen takes it in milliseconds."""
UNWRITTEN = 1000
"""Lines that wait while the terminal takes nothing; what comes on top is lost to it."""


class View:
    """Shows one node of this process from entering the context to leaving it."""

    def __init__(self, settings: Settings) -> None:
        self.interrupted = False
        self.stuck = False
        """The terminal takes nothing: whoever writes to it waits for ever."""
        self._settings = settings
        self._console = Console(highlight=False)
        self._live: Live | None = None
        self._steady = False
        self._drawing = threading.Lock()
        self._unwritten: queue.Queue[Callable[[], None]] = queue.Queue(UNWRITTEN)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="view", daemon=True)
        self._shown: NodeStatus | None = None
        self._announced: set[str] = set()
        self._narrator = Narrator(settings.start_wait_s, time.monotonic())

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live = self._start_live(Text("starting"))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; the last picture stays."""
        self._ended.set()
        self._later(lambda: None)
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)
        self.stuck = not self._drawing.acquire(timeout=CLOSE_S)
        if self.stuck:
            return
        try:
            if self._live is not None:
                self._live.stop()
        finally:
            self._drawing.release()

    def draining(self) -> None:
        """Tell that the first Ctrl-C was heard."""
        self._later(lambda: self._say("leaving: running answers end, members are told (again Ctrl-C: at once)"))

    def log_handler(self) -> logging.Handler:
        """Where log lines go, so that they do not tear the picture."""
        if self._console.is_terminal:
            return _Handed(RichHandler(console=self._console, show_path=False), self._log)
        return _Handed(logging.StreamHandler(sys.stderr), self._log)

    def _later(self, write: Callable[[], None]) -> None:
        """Have the view's thread write something."""
        with contextlib.suppress(queue.Full):
            self._unwritten.put_nowait(write)

    def _log(self, handler: logging.Handler, record: logging.LogRecord) -> None:
        def write() -> None:
            with self._drawing:
                handler.handle(record)

        if self._ended.is_set() and not self._thread.is_alive():
            write()  # the last words of a node, behind the last picture
        else:
            self._later(write)

    def _write_waiting(self, until: float) -> None:
        """What the node wants said, as it comes, until that time; at the end only what is there already."""
        while True:
            left = 0.0 if self._ended.is_set() else max(0.0, until - time.monotonic())
            try:
                write = self._unwritten.get(timeout=left) if left else self._unwritten.get_nowait()
            except queue.Empty:
                return
            write()

    def _watch(self) -> None:
        control: Control | None = None
        while True:
            self._write_waiting(time.monotonic() + (STEADY_S if self._steady else MOVING_S))
            if self._ended.is_set():
                break
            try:
                control = control or self._connect()
                if control is not None:
                    self._show(control, control.status())
            except MeshError:
                # Starting or leaving; the node's own error, if there is one, is told by whoever runs it.
                control = None
        if control is not None:
            control.close()

    def _connect(self) -> Control | None:
        node = running_node(self._settings.data)
        return Control.of(self._settings.data) if node is not None and node.pid == os.getpid() else None

    def _show(self, control: Control, status: NodeStatus) -> None:
        states = {deployment.state for deployment in status.deployments}
        self._steady = states == {"serving"} and not status.opening
        if self._live is None:
            for line in self._narrator.hear(status, time.monotonic()):
                self._say(line)
            return
        if self._shown is None and status.issuer:
            issued = control.invite(InviteRequest(expires_s=INVITE_LIFE_S))
            self._say("on another machine (for one machine, within a day):\n\n  meshnode join " + issued.invite + "\n")
        for deployment in status.deployments:
            if deployment.state == "serving" and deployment.run not in self._announced:
                self._announced.add(deployment.run)
                asking = curl_line(status.api_url, deployment.model, keyed=bool(self._settings.api_key))
                self._say(f"{ready_line(status, deployment)}\n\n  {asking}\n")
        self._shown = status
        with self._drawing:
            self._live.update(picture(status), refresh=True)

    def _say(self, line: str) -> None:
        with self._drawing:
            if self._live is not None:
                # The picture would be drawn again with this line's options; so it goes away, and a new one comes below.
                self._live.transient = True
                self._live.stop()
            # Soft wrapping: what is meant to be pasted stays one line, however narrow the terminal is.
            self._console.print(line, markup=False, soft_wrap=True)
            if self._live is not None and not self._ended.is_set():
                self._live = self._start_live(self._live.renderable)

    def _start_live(self, shown: RenderableType) -> Live:
        live = Live(shown, console=self._console, auto_refresh=False, vertical_overflow="visible")
        live.start(refresh=True)
        return live


class _Handed(logging.Handler):
    """Hands records to whoever may write them with `target`."""

    def __init__(self, target: logging.Handler, take: Callable[[logging.Handler, logging.LogRecord], None]) -> None:
        super().__init__()
        self._target = target
        self._take = take

    def setFormatter(self, fmt: logging.Formatter | None) -> None:
        """As of logging.Handler."""
        self._target.setFormatter(fmt)

    def emit(self, record: logging.LogRecord) -> None:
        """As of logging.Handler."""
        self._take(self._target, record)


def picture(status: NodeStatus) -> RenderableType:
    """The part of the terminal that changes in place."""
    bars = _bars(status)
    return Group(status_view(status), *([Text(), bars] if bars else []))


def _bars(status: NodeStatus) -> RenderableType | None:
    moving = [
        (f"{deployment.model} stage {stage.stage} {stage.state} on {stage.name}", stage.done, stage.total)
        for deployment in status.deployments
        for stage in deployment.stages
        if progress_words(stage)
    ]
    moving += [(f"{model} reading the file", *part) for model, part in status.opening.items()]
    if not moving:
        return None
    bars = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    for what, done, total in moving:
        bars.add_task(what, total=total, completed=done)
    return bars
