"""Inside a stage process: requests of the node in, replies and events out.

The main thread reads requests and answers at once what can be answered at once (so `ping` works during a load); loads
and frames are the computing thread's, a handshake has a thread of its own.

Invariant: exactly one final reply per request. When the socket pair ends (the node is gone), the process ends.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import threading
from time import monotonic

from meshnode.errors import MeshError, PeerError, StageError
from meshnode.io.stage import descriptors
from meshnode.io.stage.computing import Computing, Loaded
from meshnode.io.stage.lease import StageLease
from meshnode.io.stage.neighbours import Neighbours
from meshnode.io.stage.wiring import Wiring
from meshnode.io.stage.yielding import aside
from meshnode.wire import stage_protocol as protocol
from meshnode.wire.rowcodec import WIRE_DTYPES

EXIT_PARENT_GONE = 3
"""The node ended without saying shutdown."""
_UNLOAD_S = 2.0
"""Shutdown waits this long for the computing thread; then the process ends with the model still loaded."""
_PROGRESS_STEP = 0.01
"""Of a load between two progress messages: 100 in all, however often native code calls back."""

log = logging.getLogger(__name__)


class Control:
    """The child's end of the socket pair."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._writing = threading.Lock()
        self._buffer = bytearray()
        self._descriptors: list[int] = []

    def receive(self) -> protocol.Request | protocol.Unknown | None:
        """The next request; None when the node is gone. Raises PeerError."""
        while True:
            if len(self._buffer) >= protocol.LENGTH_BYTES:
                end = protocol.LENGTH_BYTES + protocol.body_length(bytes(self._buffer[: protocol.LENGTH_BYTES]))
                if len(self._buffer) >= end:
                    body = bytes(self._buffer[protocol.LENGTH_BYTES : end])
                    del self._buffer[:end]
                    return protocol.decode_request(body)
            try:
                data, found = descriptors.receive(self._connection, 65536)
            except OSError:
                return None
            self._descriptors += found
            if not data:
                return None
            self._buffer += data

    def take_descriptor(self) -> socket.socket:
        """The connection that came with the request just received. Raises StageError("no_descriptor")."""
        if not self._descriptors:
            raise StageError("no_descriptor", "no connection came with this request")
        return socket.socket(fileno=self._descriptors.pop(0))

    def drop_descriptors(self) -> None:
        """Close connections that no request took."""
        descriptors.close_all(self._descriptors)

    def send(self, reply: protocol.Reply) -> None:
        """From any thread. A node that is gone is noticed by `receive`."""
        with self._writing:
            try:
                self._connection.sendall(protocol.encode(reply))
            except OSError as error:
                log.warning("a reply was lost: %s", error)


class StageChild:
    """The whole of a stage process but its native parts."""

    def __init__(self, connection: socket.socket, wiring: Wiring) -> None:
        self._control = Control(connection)
        self._wiring = wiring
        self._neighbours = Neighbours(wiring)
        self._lease = StageLease()
        self._computing = Computing(self._lease)
        self._loading: protocol.LoadStage | None = None
        self._cancelled = threading.Event()
        self._loaded: Loaded | None = None

    def run(self) -> int:
        """Serve requests until Shutdown (0) or the end of the node (EXIT_PARENT_GONE)."""
        self._computing.start()
        while True:
            try:
                request = self._control.receive()
            except PeerError as error:
                log.warning("the node does not speak the stage protocol: %s", error)
                return EXIT_PARENT_GONE
            if request is None:
                log.warning("the node is gone")
                return EXIT_PARENT_GONE
            if isinstance(request, protocol.Shutdown):
                self._unload_in_time()
                self._control.send(protocol.Bye(id=request.id))
                return 0
            try:
                self._answer(request)
            except StageError as error:
                self._control.send(protocol.Error(id=request.id, kind=error.reason, message=str(error)))
            self._control.drop_descriptors()

    def _answer(self, request: protocol.Request | protocol.Unknown) -> None:
        match request:
            case protocol.Ping(id=number):
                self._control.send(self._identity(number))
            case protocol.Prepare(id=number):
                self._control.send(protocol.Prepared(id=number, public_key=self._neighbours.public_key()))
            case protocol.Credentials(id=number):
                self._neighbours.install(request)
                self._control.send(protocol.Done(id=number))
            case protocol.Adopt():
                self._adopt(request)
            case protocol.Load():
                self._load(request)
            case protocol.Cancel(id=number):
                self._cancelled.set()
                self._control.send(protocol.Done(id=number))
            case protocol.Connect():
                self._connect(request)
            case protocol.Lease(id=number, remaining_ms=remaining):
                self._lease.renew(remaining)
                self._control.send(protocol.Done(id=number))
            case protocol.Bar(id=number, nodes=nodes):
                self._neighbours.bar(nodes)
                self._control.send(protocol.Done(id=number))
            case protocol.Stats(id=number):
                loaded = self._require_loaded()
                self._control.send(loaded.meter.statistics(number, loaded.table.cells_used))
            case protocol.Unload(id=number):
                self._unload(number)
            case protocol.Unknown(malformed=defect, op=op) if defect:
                raise StageError("malformed", f"{op}: {defect}")
            case protocol.Unknown(op=op):
                raise StageError("unknown_op", f"this stage does not know the op {op!r}")

    def _identity(self, number: int) -> protocol.Pong:
        what = self._loading if self._loaded is None else self._loaded.what
        state = "empty" if what is None else "loading" if self._loaded is None else "loaded"
        pong = protocol.Pong(id=number, protocol=protocol.PROTOCOL, build=self._wiring.build, state=state)
        if what is None:
            return pong
        return protocol.Pong(
            id=number,
            protocol=pong.protocol,
            build=pong.build,
            state=state,
            stage=what.stage,
            stages=what.stages,
            first=what.first,
            last=what.last,
            layer_count=what.layer_count,
            fingerprint=self._loaded.engine.fingerprint() if self._loaded is not None else "",
            manifest_digest=what.manifest_digest,
        )

    def _require_loaded(self) -> Loaded:
        if self._loaded is None:
            raise StageError("not_loaded", "no model is loaded")
        return self._loaded

    def _load(self, request: protocol.Load) -> None:
        if self._loading is not None or self._loaded is not None:
            raise StageError("already_loaded", "a stage holds one slice at a time")
        if defect := _defect(request.what):
            raise StageError("malformed", defect)
        self._loading = request.what
        self._cancelled.clear()
        self._control.send(protocol.Accepted(id=request.id))
        self._computing.submit(lambda: aside(lambda: self._load_now(request)))

    def _load_now(self, request: protocol.Load) -> None:
        began, told = monotonic(), 0.0

        def progress(fraction: float) -> bool:
            nonlocal told
            if fraction - told >= _PROGRESS_STEP:
                told = fraction
                self._control.send(protocol.Progress(id=request.id, fraction=fraction))
            return not self._cancelled.is_set()

        try:
            engine = self._wiring.load_engine(request.what, progress)
        except MeshError as error:
            self._loading = None
            kind = error.reason if isinstance(error, StageError) else error.kind
            self._control.send(protocol.Error(id=request.id, kind=kind, message=str(error)))
            return
        # What is imported and loaded by now stays: a collection that walks through it takes 27 ms, several tokens.
        gc.collect()
        gc.freeze()
        self._loaded = Loaded(request.what, engine, self._wiring)
        self._loading = None
        self._control.send(
            protocol.Loaded(
                id=request.id,
                width=engine.width,
                vocabulary=engine.vocabulary,
                trim_any=engine.trim_any,
                fingerprint=engine.fingerprint(),
                memory_bytes=engine.memory_bytes(),
                milliseconds=int((monotonic() - began) * 1000),
            )
        )

    def _connect(self, request: protocol.Connect) -> None:
        raw = self._control.take_descriptor()
        try:
            loaded = self._require_loaded()
            self._neighbours.reserve(request.side)
        except StageError:
            raw.close()
            raise
        threading.Thread(
            target=self._connect_now, args=(request, raw, loaded), name=f"stage-{request.side}", daemon=True
        ).start()

    def _connect_now(self, request: protocol.Connect, raw: socket.socket, loaded: Loaded) -> None:
        try:
            hops = self._neighbours.connect(request.side, raw)
        except StageError as error:
            self._control.send(protocol.Error(id=request.id, kind=error.reason, message=str(error)))
            return
        self._control.send(protocol.Connected(id=request.id, side=request.side))
        if hops is None:
            return

        def serve() -> None:
            event = self._computing.serve(loaded, hops)
            # Before the node hears of it: it may connect others at once.
            self._neighbours.forget(hops)
            if event is not None:
                self._control.send(event)

        self._computing.submit(serve)

    def _adopt(self, request: protocol.Adopt) -> None:
        loaded = self._require_loaded()
        if (request.stages == request.stage + 1) is not loaded.last or (request.stage == 0) is not loaded.first:
            raise StageError("wrong_place", "the first and the last stage hold other tensors than those between")
        self._neighbours.install(request)

        def renumber() -> None:
            loaded.step.stage = request.stage
            if request.clear:
                loaded.table.clear()
            self._control.send(protocol.Done(id=request.id))

        self._computing.submit(renumber)

    def _unload(self, number: int) -> None:
        self._require_loaded()
        self._end_streams()
        self._computing.submit(lambda: self._unload_now(number))

    def _end_streams(self) -> None:
        self._cancelled.set()
        self._neighbours.drop()
        self._computing.abort()

    def _unload_now(self, number: int) -> None:
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            loaded.engine.close()
        self._control.send(protocol.Done(id=number))

    def _unload_in_time(self) -> None:
        self._end_streams()
        idle = threading.Event()
        self._computing.submit(idle.set)
        if not idle.wait(_UNLOAD_S):
            log.warning("native code still runs; the process ends without waiting for it")


def _defect(what: protocol.LoadStage) -> str:
    if not 0 <= what.stage < what.stages or not 0 <= what.first < what.last <= what.layer_count:
        return "the place of this stage is impossible"
    if what.threads < 1 or what.step_deadline_ms < 1 or what.silence_ms < 1:
        return "threads and times must be positive"
    if what.options.wire_dtype not in WIRE_DTYPES:
        return f"activations cannot travel as {what.options.wire_dtype!r}"
    return ""


def main(connection: socket.socket, wiring: Wiring) -> None:
    """Run a stage process to its end. Never returns: threads in native code must not hold the exit up."""
    code = StageChild(connection, wiring).run()
    logging.shutdown()
    os._exit(code)
