"""The head's end of a pipeline: the scheduler, a stream to stage 0, and a stream from the last stage.

    generate() -> scheduler -> frames -> stage 0 ... last stage -> samples -> scheduler -> consumers

One task reads and answers at once with the frames that became possible; another sends what consumers caused. Consumers
never touch a stream: being cancelled in the middle of a send would break it.

Invariant: leaving `generate` frees the lane exactly once; when either stream ends, every consumer gets StageLost.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf
from typing import Final, Protocol

import trio

from meshnode.core.serving.events import Event, Failed, Statistics
from meshnode.core.serving.options import UNREAD_TOKENS, ServingOptions
from meshnode.core.serving.prefixes import Reuse
from meshnode.core.serving.request import Generation, Sampled
from meshnode.core.serving.scheduler import Scheduler
from meshnode.errors import MeshError, PeerError, StageLost
from meshnode.wire.activation import HEADER_BYTES, META_BYTES, Frame, Header, Heartbeat, decode, encode
from meshnode.wire.fence import Fence

HEARTBEAT_S: Final = 0.25
"""NETWORK: a sign of life on an idle activation stream."""

GREETING_S: Final = 5.0
"""As everywhere before a neighbour is known (NETWORK)."""

_LOOK_S: Final = 5.0
"""The longest time between two looks at the clock while there is a request."""

_READ_BYTES: Final = 16 * 1024
"""One read: what a TLS record holds at most. Samples of a microbatch are 100 bytes."""


class ByteStream(Protocol):
    """A connected, authenticated stream (`headstream.HeadStream`; any TLS stream of trio fits)."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Something, or nothing at the end."""

    async def aclose(self) -> None:
        """Close."""


class HeadPipeline:
    """Serves generations over a connected run: a `core.serving.request.Generator`. `run` must be running."""

    def __init__(
        self,
        options: ServingOptions,
        fence: Fence,
        to_first: ByteStream,
        from_last: ByteStream,
        silence_s: float = 2.0,
    ) -> None:
        self._scheduler = Scheduler(options, fence)
        self._fence = fence
        self._to_first, self._from_last = to_first, from_last
        self._silence_s = silence_s
        self._consumers: dict[str, trio.MemorySendChannel[Sampled | MeshError]] = {}
        self._buffer = bytearray()
        self._outgoing: list[bytes | memoryview] = []
        self._sending = False
        self._wake = trio.Event()
        self._timer = trio.CancelScope()
        self._number = 0
        self._heard = -inf
        self._quiet = False

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Greet both neighbours and serve until cancelled; both streams are closed then.

        Raises StageLost when the pipeline is gone.
        """
        error = StageLost("the pipeline was stopped")
        try:
            await self._greet()
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                for task in (self._read, self._write, self._expire, self._beat, self._watch_first):
                    nursery.start_soon(task)
                task_status.started()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            error = StageLost("a stream of the pipeline broke")
        except* (PeerError, StageLost) as group:
            error = _first(group)
        finally:
            self._deliver(self._scheduler.lose(error))
            await self.aclose()
        raise error

    @asynccontextmanager
    async def generate(self, request: Generation) -> AsyncIterator[AsyncIterator[Sampled]]:
        """Stream one generation; see `core.serving.request.Generator` for what it raises."""
        self._scheduler.submit(request, trio.current_time())
        # One more than a lane may run ahead: sending into it never blocks.
        send, receive = trio.open_memory_channel[Sampled | MeshError](UNREAD_TOKENS + 1)
        self._consumers[request.id] = send
        self._wake.set()
        self._set_timer()
        try:
            yield _Tokens(self, request.id, receive)
        finally:
            del self._consumers[request.id]
            self._scheduler.cancel(request.id, trio.current_time())
            self._wake.set()
            send.close()
            receive.close()

    def taken(self, request_id: str) -> None:
        """A consumer took a token: its lane may go on if it rested."""
        if self._scheduler.taken(request_id, trio.current_time()):
            self._wake.set()
            self._set_timer()

    def drain(self, reason: str) -> None:
        """Refuse new generations as Unavailable."""
        self._scheduler.drain(reason)

    def limit_reuse(self, reuse: Reuse) -> None:
        """What may be used again of ended requests; what they left so far is freed."""
        self._scheduler.limit_reuse(reuse)
        self._wake.set()

    def statistics(self) -> Statistics:
        """Counters and gauges of this run."""
        return self._scheduler.statistics()

    async def aclose(self) -> None:
        """Close both streams; `run` then ends with StageLost. Twice is fine."""
        for stream in (self._to_first, self._from_last):
            with trio.move_on_after(1) as scope:
                scope.shield = True
                try:
                    await stream.aclose()
                except (trio.BrokenResourceError, OSError):
                    pass

    # --- tasks ------------------------------------------------------------------------------------------

    async def _greet(self) -> None:
        """Both ends of a stream say the fence before anything else (docs/protocols/activation.md)."""
        greeting = b"".join(encode(Heartbeat(self._fence)))
        with trio.move_on_after(GREETING_S) as scope:
            for stream in (self._to_first, self._from_last):
                await stream.send_all(greeting)
            for stream, buffer in ((self._to_first, bytearray()), (self._from_last, self._buffer)):
                while (frame := _take(buffer)) is None:
                    await self._receive(stream, buffer)
                if frame.fence != self._fence or not isinstance(frame, Heartbeat):
                    raise PeerError("a stage did not greet with this run's fence")
        if scope.cancelled_caught:
            raise StageLost("a stage did not greet in time")
        self._heard = trio.current_time()

    async def _receive(self, stream: ByteStream, buffer: bytearray) -> None:
        data = await stream.receive_some(_READ_BYTES)
        if not data:
            raise StageLost("a stage closed its stream")
        buffer += data

    async def _read(self) -> None:
        while True:
            events: list[Event] = []
            try:
                while (frame := _take(self._buffer)) is not None:
                    if frame.fence != self._fence:
                        raise PeerError("the last stage sent a frame of another run")
                    events += self._scheduler.frame_received(frame, self._heard)
                # The stages first: they wait for the next row, consumers only look on.
                self._collect(self._heard)
                await self._flush()
            finally:
                self._deliver(events)
            await self._receive(self._from_last, self._buffer)
            self._heard = trio.current_time()

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            self._collect(trio.current_time())
            await self._flush()

    async def _expire(self) -> None:
        while True:
            with trio.CancelScope() as self._timer:
                self._set_timer()
                await trio.sleep_forever()
            self._deliver(self._scheduler.expire(trio.current_time()))
            self._wake.set()

    async def _beat(self) -> None:
        silent = 0
        while True:
            await trio.sleep(HEARTBEAT_S)
            now = trio.current_time()
            self._scheduler.look()
            # Twice in a row: after a halt of this process the reader gets its turn first.
            silent = silent + 1 if now - self._heard > self._silence_s else 0
            if silent >= 2:
                raise StageLost(f"the last stage was silent for {self._silence_s:g} s")
            if self._quiet and not self._sending:
                self._outgoing += encode(Heartbeat(self._fence, self._number))
                await self._flush()
            self._quiet = True

    async def _watch_first(self) -> None:
        while True:
            await self._receive(self._to_first, bytearray())

    # --- pieces -----------------------------------------------------------------------------------------

    def _collect(self, now: float) -> None:
        """Queue what the scheduler wants sent. The queue is bounded by the frames that may be in flight."""
        for frame in self._scheduler.next_frames(now):
            self._number = frame.microbatch
            self._outgoing += encode(frame)

    async def _flush(self) -> None:
        """Send what is queued, unless another task does so right now: then it takes ours along."""
        if self._sending:
            return
        self._sending = True
        try:
            while self._outgoing:
                data = self._outgoing[0] if len(self._outgoing) == 1 else b"".join(self._outgoing)
                self._outgoing.clear()
                await self._to_first.send_all(data)
                self._quiet = False
        finally:
            self._sending = False

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            channel = self._consumers.get(event.id)
            if channel is not None:
                channel.send_nowait(event.error if isinstance(event, Failed) else event.sampled)

    def _set_timer(self) -> None:
        deadline = self._scheduler.deadline()
        # Answers may bring it forward: look again after a while.
        self._timer.deadline = inf if deadline is None else min(deadline, trio.current_time() + _LOOK_S)


class _Tokens:
    """The tokens of one generation. Not a generator: there is nothing to close."""

    def __init__(
        self, pipeline: HeadPipeline, request_id: str, channel: trio.MemoryReceiveChannel[Sampled | MeshError]
    ) -> None:
        self._pipeline, self._id, self._channel = pipeline, request_id, channel
        self._ended = False

    def __aiter__(self) -> _Tokens:
        return self

    async def __anext__(self) -> Sampled:
        if self._ended:
            raise StopAsyncIteration
        item = await self._channel.receive()
        if isinstance(item, MeshError):
            self._ended = True
            raise item
        self._ended = bool(item.finish)
        self._pipeline.taken(self._id)
        return item


def _take(buffer: bytearray) -> Frame | None:
    """The next whole frame off the front of `buffer`. Raises PeerError."""
    if len(buffer) < HEADER_BYTES:
        return None
    header = Header.parse(buffer[:HEADER_BYTES])
    if header.rows or header.meta_bytes > META_BYTES:
        raise PeerError("the last stage sent rows to the head")
    end = HEADER_BYTES + header.body_bytes
    if len(buffer) < end:
        return None
    frame = decode(header, bytes(buffer[HEADER_BYTES:end]))
    del buffer[:end]
    return frame


def _first(group: BaseExceptionGroup[PeerError | StageLost]) -> StageLost:
    """One StageLost for whatever ended the tasks."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, StageLost) else StageLost(f"the pipeline ended: {error}")
