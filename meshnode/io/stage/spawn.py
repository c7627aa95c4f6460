"""A child process with an inherited socket pair: started, watched, reaped; what native code may crash in.

The pair carries protocol only. The child's stdout and stderr go through one pipe, of which the last lines are kept for
the error that says why it ended: a stray print of native code cannot disturb anything.

Invariant: however the owner leaves (`aclose`, cancellation, an exception), the process is dead and reaped afterwards.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import trio

import meshnode
from meshnode.errors import StageLost
from meshnode.io.stage import descriptors

_LINES = 20
"""Lines of its output that an error quotes at most; native aborts print 5 to 15."""
_LINE_CHARACTERS = 400
_DRAIN_S = 1.0
"""How long the output of a dead child is still read: only a grandchild could hold the pipe open longer."""


def native_environment(threads: int) -> dict[str, str]:
    """What must be set before native code that computes with `threads` threads loads."""
    return {
        # Stages share cores: waiting threads must sleep, not spin.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        # Weights in large pages: every token reads all of them, 7 to 9 per cent faster so (docs/decisions/0016).
        # glibc 2.35 and later on Linux; nobody else knows the name. A user's own tunables stay.
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES") or "glibc.malloc.hugetlb=1",
    }


class ChildProcess:
    """`python -m <module> <fd>` with `connection`, our end of the pair."""

    def __init__(self, name: str, process: trio.Process, connection: trio.socket.SocketType, output: int) -> None:
        self.name = name
        self.connection = connection
        self._process = process
        self._output = output
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._drained = trio.Event()
        # Shielded: the last words are wanted also when all is being cancelled; the watcher ends the reading.
        self._reading = trio.CancelScope(shield=True)
        self.ended = trio.Event()
        """Set when the process is dead and reaped and its output was read."""

    @staticmethod
    async def start(
        nursery: trio.Nursery,
        name: str,
        module: str,
        environment: Mapping[str, str],
        arguments: Sequence[str] = (),
        inherited: Sequence[int] = (),
    ) -> ChildProcess:
        """Start it; its watcher lives in `nursery`, whose cancellation kills the child. `inherited`: descriptors that
        it keeps open, whatever it does.

        Raises ConfigError on systems that cannot pass descriptors: without them no child can have its socket pair.
        """
        descriptors.require()
        ours, theirs = socket.socketpair()
        reading, writing = os.pipe()
        try:
            package = str(Path(meshnode.__file__).parent.parent)
            paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
            process = await trio.lowlevel.open_process(
                # -P: the current directory is not searched for modules.
                [sys.executable, "-P", "-m", module, str(theirs.fileno()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                pass_fds=[theirs.fileno(), *inherited],
                env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
            )
        except BaseException:
            ours.close()
            os.close(reading)
            raise
        finally:
            theirs.close()
            os.close(writing)
        child = ChildProcess(name, process, trio.socket.from_stdlib_socket(ours), reading)
        nursery.start_soon(child._watch)
        nursery.start_soon(child._read_output)
        return child

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.returncode

    def kill(self) -> None:
        """SIGKILL; harmless when it has ended."""
        self._process.kill()

    def lost(self) -> StageLost:
        """Why it ended, with its last words."""
        code = self._process.returncode
        how = "was ended" if code is None else f"exited with code {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        words = "\n".join(self._lines)
        return StageLost(f"{self.name} {how}" + (f"; it said last:\n{words}" if words else ""))

    async def aclose(self) -> None:
        """Kill and reap. Never cancelled half-way."""
        with trio.CancelScope(shield=True):
            self.kill()
            await self.ended.wait()

    async def _watch(self) -> None:
        try:
            await self._process.wait()
        finally:
            with trio.CancelScope(shield=True):
                self._process.kill()
                await self._process.wait()
                with trio.move_on_after(_DRAIN_S):
                    await self._drained.wait()
                self._reading.cancel()
                self.connection.close()
                self.ended.set()

    async def _read_output(self) -> None:
        rest = b""
        with self._reading:
            async with trio.lowlevel.FdStream(self._output) as stream:
                while data := await stream.receive_some(4096):
                    *lines, rest = (rest + data).split(b"\n")
                    rest = rest[-_LINE_CHARACTERS:]
                    for line in lines:
                        self._keep(line)
        if rest:
            self._keep(rest)
        self._drained.set()

    def _keep(self, line: bytes) -> None:
        self._lines.append(line.decode(errors="replace").rstrip()[:_LINE_CHARACTERS])
