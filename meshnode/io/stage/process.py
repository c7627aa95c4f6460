"""The node's side of a stage: one child process, requests with deadlines, and what it says by itself.

    stage = await StageProcess.spawn(nursery, "stage 1", threads=1, on_event=print)
    async with stage:
        ...

Invariants: every request ends: with its reply, with StageError (the stage's own `kind`, or "no_answer" at the
deadline), or with StageLost when the process ends. Leaving the context kills and reaps.
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, TypeVar

import msgspec
import trio

from meshnode.errors import PeerError, StageError, StageLost
from meshnode.identity.ids import NodeId
from meshnode.io.stage import descriptors
from meshnode.io.stage.spawn import ChildProcess, native_environment
from meshnode.wire.stage_protocol import (
    LENGTH_BYTES,
    Accepted,
    Adopt,
    Bar,
    Bye,
    Cancel,
    Connect,
    Connected,
    Credentials,
    Done,
    Error,
    Event,
    Lease,
    Load,
    Loaded,
    LoadStage,
    Ping,
    Pong,
    Prepare,
    Prepared,
    Progress,
    Reply,
    Request,
    Shutdown,
    Statistics,
    Stats,
    Unknown,
    Unload,
    body_length,
    decode_reply,
    encode,
)

ANSWER_S: Final = 10.0
"""Any request but Load: the stage answers from a thread of its own within milliseconds; ten seconds of a machine that
swaps are not yet a reason to give a slice up."""
CONNECT_S: Final = 10.0
"""The stage gives a handshake 5 s."""
LOAD_S: Final = 1800.0
"""40 GB from a slow disk (25 MB/s)."""
GRACE_S: Final = 3.0
"""From Shutdown to SIGKILL: within the 5 s in which a node leaves."""
_OUTGOING = 16
"""Requests that may wait for a stage that does not read; a node asks one or two things at a time."""
MODULE: Final = "meshnode.app.stage_start"

_Answer = TypeVar("_Answer", bound=Reply)


class _Pending:
    """One request under way."""

    def __init__(self, progress: Callable[[float], None] | None) -> None:
        self.progress = progress
        self.done = trio.Event()
        self.reply: Reply | Unknown | None = None


class StageProcess:
    """One stage process. `on_event` is called in the event loop and must not block."""

    def __init__(self, child: ChildProcess, on_event: Callable[[Event], None]) -> None:
        self._child = child
        self._on_event = on_event
        self._pending: dict[int, _Pending] = {}
        self._last_id = 0
        self._outgoing, self._waiting = trio.open_memory_channel[tuple[bytes, socket.socket | None]](_OUTGOING)

    @staticmethod
    async def spawn(
        nursery: trio.Nursery,
        name: str,
        *,
        threads: int,
        on_event: Callable[[Event], None],
        module: str = MODULE,
        lock: tuple[Path, int] | None = None,
    ) -> StageProcess:
        """Start a stage process; its tasks live in `nursery`. `threads` = what its native code may use. `lock`: a file
        and a descriptor with a share of its lock, which the process keeps; the path is an argument, by which it is
        found when it outlives its node."""
        arguments, inherited = ((str(lock[0]),), (lock[1],)) if lock is not None else ((), ())
        child = await ChildProcess.start(nursery, name, module, native_environment(threads), arguments, inherited)
        stage = StageProcess(child, on_event)
        nursery.start_soon(stage._send)
        nursery.start_soon(stage._receive)
        nursery.start_soon(stage._fail_when_ended)
        return stage

    async def __aenter__(self) -> StageProcess:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Kill and reap; after `shutdown` there is nothing left to kill."""
        await self._child.aclose()

    @property
    def pid(self) -> int:
        """Process id, for memory figures."""
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._child.exit_code

    async def wait_lost(self) -> StageLost:
        """Wait until the process has ended; says why, with its last words."""
        await self._child.ended.wait()
        return self._child.lost()

    async def ping(self, timeout_s: float = ANSWER_S) -> Pong:
        """Identity; answered before a load and during one."""
        return await self._request(Ping(id=self._next_id()), Pong, timeout_s)

    async def prepare(self) -> bytes:
        """DER SubjectPublicKeyInfo of the key that the stage made for itself."""
        return (await self._request(Prepare(id=self._next_id()), Prepared)).public_key

    async def credentials(self, credentials: Credentials) -> None:
        """Certificate, neighbours' names and fence (the message's `id` is filled in here)."""
        await self._request(_numbered(credentials, self._next_id()), Done)

    async def adopt(self, adopt: Adopt) -> None:
        """Another fence and other neighbours for a loaded stage; its streams close, its cache stays."""
        await self._request(_numbered(adopt, self._next_id()), Done)

    async def load(
        self, what: LoadStage, progress: Callable[[float], None] | None = None, timeout_s: float = LOAD_S
    ) -> Loaded:
        """Load and probe a slice. `progress(fraction)` is called in the event loop."""
        return await self._request(Load(id=self._next_id(), what=what), Loaded, timeout_s, progress=progress)

    async def cancel(self) -> None:
        """Stop the load that runs; its `load` raises StageError("cancelled")."""
        await self._request(Cancel(id=self._next_id()), Done)

    async def connect(self, side: str, connection: socket.socket) -> None:
        """Hand `connection` over (closed here in any case) and wait until both ends have proved themselves.

        `side`: stage_protocol.UPSTREAM for an accepted connection, DOWNSTREAM for a dialed one.
        """
        try:
            descriptors.require()
            message = Connect(id=self._next_id(), side=side)
            await self._request(message, Connected, CONNECT_S, connection=connection)
        finally:
            connection.close()

    async def lease(self, remaining_s: float) -> None:
        """The stage answers frames for so long from now."""
        await self._request(Lease(id=self._next_id(), remaining_ms=max(0, int(remaining_s * 1000))), Done)

    async def bar(self, nodes: tuple[NodeId, ...]) -> None:
        """End the streams with stages of these nodes, for good."""
        await self._request(Bar(id=self._next_id(), nodes=nodes), Done)

    async def stats(self) -> Statistics:
        """Counters since the load."""
        return await self._request(Stats(id=self._next_id()), Statistics)

    async def unload(self) -> None:
        """Free the model and its cache."""
        await self._request(Unload(id=self._next_id()), Done)

    async def shutdown(self, grace_s: float = GRACE_S) -> int:
        """Ask it to end, kill it after `grace_s`; the exit code (0: it said bye and left by itself)."""
        try:
            with trio.move_on_after(grace_s):
                await self._request(Shutdown(id=self._next_id()), Bye, math.inf)
                await self._child.ended.wait()
        except (StageError, StageLost):
            pass  # it is being ended either way; the exit code tells how
        finally:
            await self._child.aclose()
        assert self._child.exit_code is not None
        return self._child.exit_code

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    async def _request(
        self,
        message: Request,
        answer: type[_Answer],
        timeout_s: float = ANSWER_S,
        *,
        progress: Callable[[float], None] | None = None,
        connection: socket.socket | None = None,
    ) -> _Answer:
        if self._child.ended.is_set():
            raise self._child.lost()
        pending = self._pending[message.id] = _Pending(progress)
        # A copy of the descriptor: the caller may close its own while this one still waits to be sent.
        copy = connection.dup() if connection is not None else None
        try:
            self._outgoing.send_nowait((encode(message), copy))
        except (trio.WouldBlock, trio.BrokenResourceError):
            del self._pending[message.id]
            if copy is not None:
                copy.close()
            raise StageError("no_answer", f"{self._child.name} does not read its requests") from None
        try:
            with trio.move_on_after(timeout_s):
                await pending.done.wait()
        finally:
            del self._pending[message.id]
        return self._outcome(message, pending.reply, answer)

    def _outcome(self, message: Request, reply: Reply | Unknown | None, answer: type[_Answer]) -> _Answer:
        if isinstance(reply, answer):
            return reply
        match reply:
            case Error(kind=kind, message=text):
                raise StageError(kind, f"{self._child.name}: {text}")
            case None if self._child.ended.is_set():
                raise self._child.lost()
            case None:
                raise StageError("no_answer", f"{self._child.name} did not answer {type(message).__name__} in time")
        raise StageError("bad_answer", f"{self._child.name} answered {type(message).__name__} with something else")

    async def _send(self) -> None:
        connection = self._child.connection
        async with self._waiting:
            try:
                async for data, passed in self._waiting:
                    view = memoryview(data)
                    if passed is not None:
                        with passed:
                            sent = await connection.sendmsg([view], descriptors.ancillary(passed.fileno()))
                            view = view[sent:]
                    while view:
                        view = view[await connection.send(view) :]
            except (OSError, trio.ClosedResourceError):
                pass  # the child has ended: `_fail_when_ended` tells everybody
            with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
                while True:
                    _, passed = self._waiting.receive_nowait()
                    if passed is not None:
                        passed.close()

    async def _receive(self) -> None:
        buffer = bytearray()
        try:
            while data := await self._child.connection.recv(65536):
                buffer += data
                while len(buffer) >= LENGTH_BYTES:
                    end = LENGTH_BYTES + body_length(bytes(buffer[:LENGTH_BYTES]))
                    if len(buffer) < end:
                        break
                    self._dispatch(decode_reply(bytes(buffer[LENGTH_BYTES:end])))
                    del buffer[:end]
        except (OSError, trio.ClosedResourceError):
            pass
        except PeerError:
            # Our own child speaks nonsense: memory was trampled on. Nothing it says can be trusted any more.
            self._child.kill()

    def _dispatch(self, reply: Reply | Unknown) -> None:
        if isinstance(reply, Event):
            self._on_event(reply)
            return
        pending = self._pending.get(reply.id)
        if pending is None:
            return  # the reply to a request whose deadline passed: read, matched to nothing
        match reply:
            case Accepted():
                pass
            case Progress(fraction=fraction):
                if pending.progress is not None:
                    pending.progress(fraction)
            case _:
                pending.reply = reply
                pending.done.set()

    async def _fail_when_ended(self) -> None:
        await self._child.ended.wait()
        self._outgoing.close()
        for pending in self._pending.values():
            pending.done.set()


_Numbered = TypeVar("_Numbered", Credentials, Adopt)


def _numbered(message: _Numbered, number: int) -> _Numbered:
    return msgspec.structs.replace(message, id=number)
