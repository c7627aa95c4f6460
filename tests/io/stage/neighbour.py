"""The other ends of a stage, played by a test: its node, its head, and strangers."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.app.bench.throwaway import ThrowawayMesh
from meshnode.io.stage.process import StageProcess
from meshnode.io.transport.tls import stage_context
from meshnode.wire.activation import HEADER_BYTES, Frame, Header, Heartbeat, Open, Rows, decode, encode
from meshnode.wire.fence import Fence
from meshnode.wire.messages import RunOptions
from meshnode.wire.sampling import Sampling
from meshnode.wire.stage_protocol import DOWNSTREAM, UPSTREAM, Credentials, Event, LoadStage

GREEDY = Sampling(temperature=0.0)
OPTIONS = RunOptions(context=256, lanes=4, chunk=64, kv_type="f16", flash_attention=True)
# Long enough for a machine with other things to do; a test waits for what happens, never for this.
PATIENCE_S = 30.0


class Events:
    """What a stage said by itself."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[Event](100)

    def __call__(self, event: Event) -> None:
        self._send.send_nowait(event)

    async def next(self) -> Event:
        with trio.fail_after(PATIENCE_S):
            return await self._receive.receive()


def whole_model(path: Path, **changes) -> LoadStage:
    place = {"stage": 0, "stages": 1, "first": 0, "last": 2, "layer_count": 2}
    return LoadStage(**({"slice_path": str(path), "options": OPTIONS, "silence_ms": 30_000} | place | changes))


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """The dialed and the accepted end of a loopback connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialed = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    return dialed, accepted


class Stream:
    """Frames over TLS."""

    def __init__(self, tls: trio.SSLStream) -> None:
        self.tls = tls

    async def send(self, frame: Frame) -> None:
        await self.tls.send_all(b"".join(encode(frame)))

    async def read(self) -> Frame:
        """The next frame that is no heartbeat."""
        with trio.fail_after(PATIENCE_S):
            while True:
                frame = await self._read_one()
                if not isinstance(frame, Heartbeat):
                    return frame

    async def greet(self, fence: Fence) -> Frame:
        await self.send(Heartbeat(fence))
        with trio.fail_after(PATIENCE_S):
            return await self._read_one()

    async def _read_one(self) -> Frame:
        header = Header.parse(await self._exactly(HEADER_BYTES))
        return decode(header, await self._exactly(header.body_bytes))

    async def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = await self.tls.receive_some(size - len(data))
            if not more:
                raise trio.BrokenResourceError("the stage closed the stream")
            data += more
        return data


async def secured(
    raw: socket.socket, mesh: ThrowawayMesh, name: str, *, server: bool, context: ssl.SSLContext | None = None
) -> Stream:
    """TLS with a leaf of `mesh` for `name`, nothing checked on this side."""
    if context is None:
        key = Ed25519PrivateKey.generate()
        context = stage_context(server, mesh.chain_for(key.public_key(), name), key, mesh.root_pem)
    raw.setblocking(False)
    tls = trio.SSLStream(
        trio.SocketStream(trio.socket.from_stdlib_socket(raw)), context, server_side=server, https_compatible=True
    )
    await tls.do_handshake()
    return Stream(tls)


async def introduce(stage: StageProcess, mesh: ThrowawayMesh, fence: Fence | None = None) -> None:
    """Credentials of stage 0 of 1: the head is on both sides."""
    chain = mesh.chain_for_spki(await stage.prepare(), mesh.stage_name(0))
    await stage.credentials(
        Credentials(
            chain=chain,
            root=mesh.root_pem,
            upstream_name=mesh.head_name,
            downstream_name=mesh.head_name,
            fence=fence or mesh.fence,
        )
    )


async def connect(stage: StageProcess, mesh: ThrowawayMesh, fence: Fence | None = None) -> tuple[Stream, Stream]:
    """Streams to and from a stage that has its credentials and its model."""
    fence = fence or mesh.fence
    streams: list[Stream] = []
    (our_up, its_up), (its_down, our_down) = tcp_pair(), tcp_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.connect, UPSTREAM, its_up)
        streams.append(await secured(our_up, mesh, mesh.head_name, server=False))
        assert await streams[0].greet(fence) == Heartbeat(fence)
        nursery.start_soon(stage.connect, DOWNSTREAM, its_down)
        streams.append(await secured(our_down, mesh, mesh.head_name, server=True))
        assert await streams[1].greet(fence) == Heartbeat(fence)
    return streams[0], streams[1]


@asynccontextmanager
async def spawned(events: Events, **options) -> AsyncIterator[StageProcess]:
    """A stage process that is gone afterwards, whatever the test did to it."""
    async with trio.open_nursery() as nursery:
        stage = await StageProcess.spawn(nursery, "stage 0", threads=1, on_event=events, **options)
        async with stage:
            yield stage
        nursery.cancel_scope.cancel()


def prompt(fence: Fence, microbatch: int, tokens: list[int], *, lane=0, start=0, opened=True) -> Rows:
    """Rows of token ids whose last one wants logits; opens the lane before."""
    count = len(tokens)
    return Rows(
        fence,
        microbatch,
        (Open(lane, GREEDY),) if opened else (),
        range(start, start + count),
        [lane] * count,
        [row == count - 1 for row in range(count)],
        tokens,
    )
