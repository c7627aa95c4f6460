"""Stages of this node: fetch the slice, start the process, load, hand descriptors over, report.

Invariant: for every Prepare there is at most one process, it is dead and reaped before memory it used is given to
another, and every end that nobody ordered is reported once.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import trio

from meshnode.app.hops import HopSeats
from meshnode.core.coordination.ledger import LEASE_S
from meshnode.core.node.effects import Kept
from meshnode.core.node.events import Event, StageReported
from meshnode.errors import MeshError, StageError, StageLost, first_of
from meshnode.identity.certificates import make_stage, stage_name
from meshnode.identity.credentials import Credentials
from meshnode.identity.ids import NodeId
from meshnode.identity.keys import public_key_of
from meshnode.io.disk.lock import share
from meshnode.io.stage.process import StageProcess
from meshnode.wire import stage_protocol
from meshnode.wire.fence import Fence
from meshnode.wire.limits import STAGE_HANDSHAKES
from meshnode.wire.messages import Connected, Failed, Fetched, Prepare, Progress, Ready

log = logging.getLogger("meshnode.stage")

REPORT_S = 0.25
"""Progress is told at most so often: a person sees no more, and a link carries little."""
LEAVE_S = 1.0
"""From the order to end to SIGKILL: with the drain before it, a node leaves within 5 s."""


CLAIM_TOLERANCE = 100
"""One part in so many: another version of this program may count recurrent state or buffers a little otherwise. Of
the 15 % that stay free of every machine's memory this is little."""


@dataclass(frozen=True)
class SlicePaths:
    """Where the files of a stage lie. `embedding` is None where the slice holds the token embedding itself."""

    slice: Path
    embedding: Path | None = None
    needed_bytes: int = 0
    """What the stage takes in all, by what the model's own header and manifest say."""


class Slices(Protocol):
    """Where slices come from (app.shelf)."""

    async def obtain(self, order: Prepare, progress: Callable[[int, int], None]) -> SlicePaths:
        """The files that `order` needs, fetched and verified, which stay until `release`. Raises MeshError."""
        ...

    def release(self, paths: SlicePaths) -> None:
        """They are used no more."""
        ...


@dataclass(frozen=True)
class Hosting:
    """What every stage process of this node gets."""

    threads: int
    """For its native code."""
    lock: Path
    """The file that it holds a share of, so that a next life of this node knows when it is gone."""


@dataclass(frozen=True)
class Post:
    """Where events go: `wait` until there is room, or drop a `hint` that a later one replaces anyway."""

    wait: Callable[[Event], Awaitable[None]]
    hint: Callable[[Event], None]


@dataclass
class _Running:
    """One stage under way."""

    order: Prepare
    reserved_bytes: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    process: StageProcess | None = None
    handshakes: int = 0
    connecting: bool = False
    """One dial at a time, however often it is ordered."""
    reported_at: float = 0.0
    renewed_at: float = field(default_factory=trio.current_time)
    paths: SlicePaths | None = None
    ended: trio.Event = field(default_factory=trio.Event)
    nursery: trio.Nursery | None = None

    @property
    def key(self) -> tuple[Fence, int]:
        """Where it belongs at present."""
        return self.order.fence, self.order.stage


class Stages:
    """All stage processes of this node, by fence and stage."""

    def __init__(
        self,
        credentials: Callable[[], Credentials],
        seats: HopSeats,
        dial_stage: Callable[[NodeId, bytes], Awaitable[socket.socket]],
        slices: Slices,
        post: Post,
        hosting: Hosting,
    ) -> None:
        self._credentials = credentials
        self._seats = seats
        self._dial_stage = dial_stage
        self._slices = slices
        self._post = post.wait
        self._hint = post.hint
        self._hosting = hosting
        self._running: dict[tuple[Fence, int], _Running] = {}
        self._kept: dict[tuple[Fence, int], _Running] = {}
        """Loaded stages that wait for the order of the run that adopts them."""
        self._fetched: dict[tuple[Fence, int], SlicePaths] = {}
        """Files that a run has here and loads when there is room."""
        self._ending: set[trio.Event] = set()
        self._barred: Callable[[NodeId], bool] = lambda node: False

    def expect(self, order: Prepare, reserved_bytes: int) -> bool:
        """Count a stage as under way, so that a `stop` before `prepare` begins ends it too; False when it is."""
        key = (order.fence, order.stage)
        if key in self._running:
            return False
        self._running[key] = _Running(order, reserved_bytes)
        return True

    async def prepare(self, order: Prepare) -> None:
        """Bring an expected stage up and watch it until it ends; every outcome is reported."""
        running = self._running[order.fence, order.stage]
        kept = None if order.hold else self._kept.pop(running.key, None)
        if kept is not None:
            del self._running[running.key]
            await self._adopt(kept, order, running.reserved_bytes)
            return
        try:
            with running.scope:
                if order.hold:
                    running.paths = await self._slices.obtain(order, self._reporter(running, "fetching"))
                else:
                    for ended in list(self._ending):
                        await ended.wait()
                    await self._run(running)
        except* MeshError as errors:
            await self._failed(running, first_of(errors))
        finally:
            self._seats.close(running.order.upstream.token)
            self._forget(running)
            if running.paths is not None:
                self._keep_files(running, running.paths)
            self._ending.discard(running.ended)
            running.ended.set()
        if order.hold and not running.scope.cancelled_caught:
            await self._post(StageReported(Fetched(order.fence, order.stage)))

    def _keep_files(self, running: _Running, paths: SlicePaths) -> None:
        """Only what was fetched for later, and not stopped meanwhile, is needed on the disk."""
        if running.order.hold and not running.scope.cancel_called and running.key not in self._fetched:
            self._fetched[running.key] = paths
        else:
            self._slices.release(paths)

    async def connect(self, fence: Fence) -> None:
        """Dial the downstream of every stage of `fence` here."""
        for (owner, _), running in list(self._running.items()):
            if owner == fence and running.process is not None and not running.connecting:
                running.connecting = True
                try:
                    await self._connect(running, running.process)
                finally:
                    running.connecting = False

    def stop(self, fence: Fence, kept: tuple[Kept, ...] = ()) -> None:
        """End the stages of `fence`, but those that another run keeps; a Prepare that follows waits until they are
        gone."""
        for key in [key for key in self._fetched if key[0] == fence]:
            self._slices.release(self._fetched.pop(key))
        places = {place.before: (place.fence, place.stage) for place in kept}
        for key, running in [*self._running.items(), *self._kept.items()]:
            if key[0] != fence:
                continue
            if key[1] in places and running.process is not None:
                self._forget(running)
                self._kept[places[key[1]]] = running
            else:
                self._ending.add(running.ended)
                running.scope.cancel()

    async def renew(self, fence: Fence) -> None:
        """The stages of `fence` may go on for another lease."""
        for key, running in list(self._running.items()):
            if key[0] == fence:
                running.renewed_at = trio.current_time()
                await self._lease(running)

    async def _lease(self, running: _Running) -> None:
        """Tell the stage how long it may serve by itself; one that is not loaded yet is told then."""
        if running.process is None:
            return
        try:
            await running.process.lease(running.renewed_at + LEASE_S - trio.current_time())
        except MeshError as error:
            log.warning("%s: stage %d did not take its lease: %s", *_place(running), error)

    async def _adopt(self, running: _Running, order: Prepare, reserved_bytes: int) -> None:
        """Give a loaded stage its place in another run: a new certificate, new neighbours, empty lanes."""
        stage, nursery = running.process, running.nursery
        self._seats.close(running.order.upstream.token)
        running.order = order
        self._running[running.key] = running
        try:
            if stage is None or nursery is None or running.paths is None:
                raise StageError("stage_lost", "the stage that was to be adopted has ended")
            await trio.to_thread.run_sync(_check_claim, running.paths, reserved_bytes)
            credentials = await self._certificate(stage, order)
            await stage.adopt(
                stage_protocol.Adopt(
                    chain=credentials.chain_pem,
                    root=credentials.root_pem,
                    upstream_name=order.upstream.peer_name,
                    downstream_name=order.downstream.peer_name,
                    fence=order.fence,
                    stage=order.stage,
                    stages=order.stages,
                    clear=True,
                )
            )
        except MeshError as error:
            running.scope.cancel()
            await self._failed(running, error)
            return
        running.renewed_at = trio.current_time()
        await self._lease(running)
        self._seats.open(order.upstream.token, self._taker(running, stage, nursery))
        await self._post(StageReported(Ready(order.fence, order.stage)))

    def _forget(self, running: _Running) -> None:
        """It ended, wherever it belongs by now."""
        for places in (self._running, self._kept):
            for key in [key for key, each in places.items() if each is running]:
                del places[key]

    async def bar(self, barred: Callable[[NodeId], bool]) -> None:
        """Have every stage end its streams with nodes that are barred now. They know no other nodes."""
        self._barred = barred
        for running in list(self._running.values()):
            if running.process is not None:
                await self._bar(running, running.process)

    async def _bar(self, running: _Running, stage: StageProcess) -> None:
        hops = running.order.upstream, running.order.downstream
        out = tuple(sorted({hop.node for hop in hops if self._barred(hop.node)}))
        if not out:
            return
        try:
            await stage.bar(out)
        except (StageError, StageLost) as error:
            log.warning("%s: stage %d could not be told of a revoked neighbour: %s", *_place(running), error)

    def pids(self) -> dict[str, int]:
        """Process ids by `<run>/<stage>`, for figures and tests."""
        return {
            f"{fence.run}/{stage}": running.process.pid
            for (fence, stage), running in self._running.items()
            if running.process is not None
        }

    async def statistics(self) -> list[tuple[Prepare, Path, stage_protocol.Statistics]]:
        """What each stage that runs has computed, with its order and the file of its slice; one that just ends is left
        out."""
        found = []
        for running in list(self._running.values()):
            if running.process is not None and running.paths is not None:
                try:
                    found.append((running.order, running.paths.slice, await running.process.stats()))
                except MeshError:
                    continue
        return found

    async def _run(self, running: _Running) -> None:
        order = running.order
        running.paths = paths = await self._slices.obtain(order, self._reporter(running, "fetching"))
        await trio.to_thread.run_sync(_check_claim, paths, running.reserved_bytes)
        async with trio.open_nursery() as nursery:
            name = f"stage {order.stage} ({order.fence.run[:8]})"
            threads, lock, heard = self._hosting.threads, self._hosting.lock, self._listener(running)
            with share(lock) as held:
                stage = await StageProcess.spawn(nursery, name, threads=threads, on_event=heard, lock=(lock, held))
            try:
                await self._certify(stage, order)
                report = self._reporter(running, "loading")
                what = stage_protocol.LoadStage(
                    slice_path=str(paths.slice),
                    embedding_path=str(paths.embedding) if paths.embedding else "",
                    stage=order.stage,
                    stages=order.stages,
                    first=order.first,
                    last=order.last,
                    layer_count=order.layers,
                    manifest_digest=order.manifest_digest,
                    options=order.options,
                    threads=threads,
                )
                await stage.load(what, lambda fraction: report(int(fraction * 1000), 1000))
                running.process, running.nursery = stage, nursery
                await self._lease(running)
                await self._bar(running, stage)
                self._seats.open(order.upstream.token, self._taker(running, stage, nursery))
                await self._post(StageReported(Ready(order.fence, order.stage)))
                raise await stage.wait_lost()
            finally:
                running.process = None
                with trio.CancelScope(shield=True):
                    await stage.shutdown(LEAVE_S)

    async def _certificate(self, stage: StageProcess, order: Prepare) -> Credentials:
        """The stage's own key under its name in this run, signed by this node."""
        node = self._credentials()
        key = public_key_of(await stage.prepare())
        name = stage_name(order.stage, order.fence.run, node.node_id)
        leaf = make_stage(node.authority, key, name, datetime.now(UTC))
        return Credentials(node.key, (leaf, *node.chain), node.root)

    async def _certify(self, stage: StageProcess, order: Prepare) -> None:
        signed = await self._certificate(stage, order)
        await stage.credentials(
            stage_protocol.Credentials(
                chain=signed.chain_pem,
                root=signed.root_pem,
                upstream_name=order.upstream.peer_name,
                downstream_name=order.downstream.peer_name,
                fence=order.fence,
            )
        )

    async def _connect(self, running: _Running, stage: StageProcess) -> None:
        order = running.order
        try:
            connection = await self._dial_stage(order.downstream.node, order.downstream.token)
            await stage.connect(stage_protocol.DOWNSTREAM, connection)
        except MeshError as error:
            await self._failed(running, error)
        else:
            await self._post(StageReported(Connected(order.fence, order.stage)))

    def _taker(
        self, running: _Running, stage: StageProcess, nursery: trio.Nursery
    ) -> Callable[[socket.socket], Awaitable[None]]:
        async def connect(connection: socket.socket) -> None:
            try:
                await stage.connect(stage_protocol.UPSTREAM, connection)
            except MeshError as error:
                log.warning("%s: a connection to stage %d was refused: %s", *_place(running), error)
            finally:
                running.handshakes -= 1

        async def take(connection: socket.socket) -> None:
            if running.handshakes >= STAGE_HANDSHAKES:
                connection.close()
                return
            running.handshakes += 1
            nursery.start_soon(connect, connection)

        return take

    def _reporter(self, running: _Running, phase: str) -> Callable[[int, int], None]:
        order = running.order

        def report(done: int, total: int) -> None:
            now = trio.current_time()
            if done < total and now - running.reported_at < REPORT_S:
                return
            running.reported_at = now
            self._hint(StageReported(Progress(order.fence, order.stage, phase, done, total)))

        return report

    def _listener(self, running: _Running) -> Callable[[stage_protocol.Event], None]:
        def heard(event: stage_protocol.Event) -> None:
            log.info("%s: stage %d says %s: %s", *_place(running), event.kind, event.message)

        return heard

    async def _failed(self, running: _Running, error: BaseException) -> None:
        order = running.order
        reason = error.reason if isinstance(error, StageError) else getattr(error, "kind", "stage")
        log.warning("%s: stage %d failed (%s): %s", *_place(running), reason, error)
        await self._post(StageReported(Failed(order.fence, order.stage, reason, str(error)[:2000])))


def _check_claim(paths: SlicePaths, reserved_bytes: int) -> None:
    """Refuse to load what takes more than was booked: the room was granted by the coordinator's word alone. Weights are
    read into memory as they lie in the files, holes included."""
    size = sum(path.stat().st_size for path in (paths.slice, paths.embedding) if path is not None)
    needed = max(size, paths.needed_bytes - paths.needed_bytes // CLAIM_TOLERANCE)
    if needed > reserved_bytes:
        takes = max(size, paths.needed_bytes)
        raise StageError("claim_mismatch", f"it takes {takes} bytes by its manifest, {reserved_bytes} were claimed")


def _place(running: _Running) -> tuple[Fence, int]:
    return running.order.fence, running.order.stage
