"""Activation streams of a stage: blocking TLS sockets, each used in one direction after the greeting.

The upstream socket is only read (by the computing thread), the downstream one only written (under a lock), because an
SSL object must not be read and written by two threads at once. Both ends greet with a heartbeat that carries the
fence: the dialing end first, the accepting end after it has checked name and fence; so a dialer knows that its
certificate was accepted (in TLS 1.3 it learns a refusal only by reading). After that the sockets have no time-outs,
which would cost a `poll` for every call: another thread looks now and then whether one waits too long.

Invariant: whatever goes wrong with a connection is LinkLost, whatever a peer does wrong PeerError or StaleFence.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Final

from meshnode.errors import LinkLost, PeerError, StaleFence
from meshnode.wire import limits
from meshnode.wire.activation import HEADER_BYTES, Header, Heartbeat, Kind, encode
from meshnode.wire.fence import Fence

HANDSHAKE_S: Final = 5.0
"""TLS and greeting together (NETWORK: before authentication 5 s)."""
HEARTBEAT_S: Final = 0.25
"""NETWORK: heartbeat every 250 ms."""
_QUEUED: Final = 4
"""Large frames that may wait for the wire: one is sent while the next chunk is computed; more would only hide that the
next stage is slower."""
_BUFFER: Final = 64 * limits.KIB
"""Read at once; larger bodies go straight into a buffer of their own size."""

Buffers = Sequence[bytes | memoryview]


def authenticate(
    raw: socket.socket, context: ssl.SSLContext, server: bool, check_peer: Callable[[bytes | None], None]
) -> ssl.SSLSocket:
    """TLS over `raw` (taken over, closed on failure) and the check of the peer's leaf."""
    try:
        raw.settimeout(HANDSHAKE_S)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = context.wrap_socket(raw, server_side=server, suppress_ragged_eofs=True)
    except (OSError, ValueError) as error:
        raw.close()
        raise LinkLost(f"the TLS handshake failed: {error}") from None
    try:
        check_peer(stream.getpeercert(binary_form=True))
    except BaseException:
        stream.close()
        raise
    return stream


class FrameReader:
    """Frames from the upstream neighbour. `expire` ends a wait that is too long."""

    def __init__(self, stream: ssl.SSLSocket) -> None:
        self._stream = stream
        self._waits_since: float | None = None
        self._ended = ""
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0

    def read(self, accept: Callable[[Header], None]) -> tuple[Header, memoryview]:
        """The next frame; its body is valid until the next read. `accept` may refuse a header before the body is read.

        Raises LinkLost, PeerError, and what `accept` raises.
        """
        # A frame starts at the front, so that numbers in it are aligned and a small one always fits.
        left = self._end - self._start
        if self._start and left:
            self._buffer[:left] = self._buffer[self._start : self._end]
        self._start, self._end = 0, left
        while self._end < HEADER_BYTES:
            self._end += self._receive(self._view[self._end :])
        header = Header.parse(self._view[:HEADER_BYTES])
        accept(header)
        size = header.body_bytes
        if HEADER_BYTES + size <= _BUFFER:
            self._start = HEADER_BYTES + size
            while self._end < self._start:
                self._end += self._receive(self._view[self._end :])
            return header, self._view[HEADER_BYTES : self._start]
        body = memoryview(bytearray(size))
        have = self._end - HEADER_BYTES
        body[:have] = self._view[HEADER_BYTES : self._end]
        self._start = self._end = 0
        while have < size:
            have += self._receive(body[have:])
        return header, body

    def _receive(self, into: memoryview) -> int:
        self._waits_since = monotonic()
        try:
            # With a buffer it answers how much it put there; typeshed knows only the form that answers with bytes.
            count: int = self._stream.read(len(into), into)  # type: ignore[assignment]
        except (OSError, ValueError) as error:
            raise LinkLost(self._ended or f"the connection broke: {error}") from None
        finally:
            self._waits_since = None
        if not count:
            raise LinkLost(self._ended or "the neighbour closed the connection")
        return count

    def expire(self, silence_s: float) -> None:
        """From another thread: take a neighbour that has said nothing for `silence_s` for lost."""
        since = self._waits_since
        if since is None or monotonic() - since <= silence_s:
            return
        # What has arrived was said in time: this process slept (a stopped virtual machine), not the neighbour.
        if not select.select([self._stream], [], [], 0)[0]:
            self._ended = "the neighbour has gone silent"
            self.interrupt()

    def interrupt(self) -> None:
        """From another thread: a blocked or later read raises LinkLost."""
        interrupt(self._stream)

    def close(self) -> None:
        """Close the socket; only from the thread that reads."""
        self._stream.close()


class FrameSender:
    """Frames to the downstream neighbour; small ones at once, large ones by a thread, heartbeats in between."""

    def __init__(self, stream: ssl.SSLSocket, fence: Fence) -> None:
        stream.settimeout(None)
        self._stream = stream
        self._writes_since: float | None = None
        self._fence = fence
        self._on_broken: Callable[[], None] | None = None
        self._writing = threading.Lock()
        self._changed = threading.Condition()
        self._queue: deque[tuple[int, Buffers]] = deque()
        self._microbatch = 0
        self._quiet = False
        self._broken = ""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="stage-writer", daemon=True)
        self._thread.start()

    def send(self, microbatch: int, buffers: Buffers) -> None:
        """Send a frame, in order, from one thread only; blocks while `_QUEUED` large ones wait. Raises LinkLost."""
        if self._broken or self._closed:
            raise LinkLost(self._broken or "the connection was closed")
        # Only this thread fills the queue, and what is in it leaves when it is written: an empty one stays empty.
        if len(buffers) == 1 and not self._queue:
            with self._writing:
                self._microbatch, self._quiet = microbatch, False
                self._write(buffers)
            return
        with self._changed:
            while len(self._queue) >= _QUEUED and not self._broken and not self._closed:
                self._changed.wait()
            if self._broken or self._closed:
                raise LinkLost(self._broken or "the connection was closed")
            # Views alias arrays that the next decode overwrites.
            self._queue.append((microbatch, [bytes(part) for part in buffers]))
            self._changed.notify_all()

    def _write(self, buffers: Buffers) -> None:
        self._writes_since = monotonic()
        try:
            for part in buffers:
                sent = self._stream.send(part)
                while sent < len(part):
                    sent += self._stream.send(memoryview(part)[sent:])
        except (OSError, ValueError) as error:
            self._broken = f"the connection broke: {error}"
            raise LinkLost(self._broken) from None
        finally:
            self._writes_since = None

    def expire(self, deadline_s: float) -> None:
        """From another thread: take a neighbour that has not read for `deadline_s` for lost.

        One that computes does not read: the deadline is that of a step.
        """
        since = self._writes_since
        if since is not None and monotonic() - since > deadline_s:
            interrupt(self._stream)

    def _run(self) -> None:
        try:
            while not self._closed:
                with self._changed:
                    if not self._queue and not self._closed:
                        self._changed.wait(HEARTBEAT_S)
                self._send_next()
        except LinkLost:
            with self._changed:
                self._changed.notify_all()
                on_broken = self._on_broken
            if on_broken is not None:
                on_broken()

    def _send_next(self) -> None:
        """The frame that waits longest, or a heartbeat if nothing was sent since the last look."""
        with self._writing:
            if self._closed:
                return
            queued = bool(self._queue)
            if queued:
                self._microbatch, buffers = self._queue[0]
                self._write(buffers)
            elif self._quiet:
                self._write(encode(Heartbeat(self._fence, self._microbatch)))
            self._quiet = True
        if queued:
            with self._changed:
                self._queue.popleft()
                self._changed.notify_all()

    def call_when_broken(self, on_broken: Callable[[], None]) -> None:
        """From the writer's thread when it finds the connection broken; at once when it has already."""
        with self._changed:
            self._on_broken = on_broken
            broken = bool(self._broken)
        if broken:
            on_broken()

    def interrupt(self) -> None:
        """From another thread: blocked and later sends raise LinkLost, the writer ends."""
        # The socket first: whoever is blocked in it may hold what the next line waits for.
        self._closed = True
        interrupt(self._stream)
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """End the writer and close the socket."""
        self.interrupt()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._stream.close()


def interrupt(stream: socket.socket) -> None:
    """Wake whoever is blocked on `stream`; it stays open for them to close (a closed number could be reused)."""
    try:
        # Not SSLSocket.shutdown, which forgets the TLS object under the feet of the other thread.
        socket.socket.shutdown(stream, socket.SHUT_RDWR)
    except OSError:
        pass  # it is closed or was never connected: nobody is blocked on it


def greet_downstream(stream: ssl.SSLSocket, fence: Fence) -> None:
    """The dialing end: say the fence and wait for the same. Raises LinkLost, PeerError, StaleFence."""
    try:
        for part in encode(Heartbeat(fence)):
            stream.sendall(part)
    except OSError as error:
        raise LinkLost(f"the connection broke: {error}") from None
    _read_greeting(FrameReader(stream), fence)


def greet_upstream(stream: ssl.SSLSocket, fence: Fence) -> FrameReader:
    """The accepting end: read and check the fence, say it back. The reader may hold what came behind the greeting."""
    reader = FrameReader(stream)
    _read_greeting(reader, fence)
    try:
        for part in encode(Heartbeat(fence)):
            stream.sendall(part)
    except OSError as error:
        raise LinkLost(f"the connection broke: {error}") from None
    stream.settimeout(None)
    return reader


def _read_greeting(reader: FrameReader, fence: Fence) -> None:
    def accept(header: Header) -> None:
        check_fence(header, fence)
        if header.kind is not Kind.HEARTBEAT or header.microbatch:
            raise PeerError("an activation stream must begin with a greeting")

    reader.read(accept)


def check_fence(header: Header, fence: Fence) -> None:
    """Raise StaleFence for a frame of another term or run."""
    if header.fence != fence:
        raise StaleFence(f"a frame of {header.fence} came, this stage serves {fence}")
