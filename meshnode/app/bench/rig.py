"""A whole pipeline on this machine: real stage processes, real TLS on loopback, a real head, a throwaway identity.

Made of the very pieces that a node uses, so that what is measured and tested here is what a mesh runs.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.app.bench.delay import loopback
from meshnode.app.bench.throwaway import ThrowawayMesh
from meshnode.core.serving.options import ServingOptions
from meshnode.core.serving.request import Generation, Sampled
from meshnode.errors import StageLost
from meshnode.io.llama.gguf_file import open_model
from meshnode.io.llama.manifest import build_manifest, open_artifacts
from meshnode.io.llama.slicing import layout_embedding, layout_slice, write_slice
from meshnode.io.stage.headstream import HeadStream, secure
from meshnode.io.stage.pipeline import HeadPipeline
from meshnode.io.stage.process import StageProcess
from meshnode.io.transport.tls import check_stage_peer, stage_context
from meshnode.wire.messages import RunOptions
from meshnode.wire.sampling import Sampling
from meshnode.wire.stage_protocol import DOWNSTREAM, UPSTREAM, Credentials, Event, Loaded, LoadStage, Statistics

GREEDY: Final = Sampling(temperature=0.0)
_SILENCE_MS: Final = 20_000
"""A busy test machine may halt a process for seconds; the mesh itself uses 2 s."""


class Surroundings:
    """What a rig's processes live in. Here: this machine as it is, and loopback between them."""

    def started(self, stage: int, pid: int) -> None:
        """A stage's process runs, and has loaded nothing yet."""

    async def hop(self, number: int) -> tuple[socket.socket, socket.socket]:
        """A TCP connection to stage `number` (or back to the head) from the one before: dialed, accepted."""
        return loopback()


@dataclass(frozen=True)
class RigOptions:
    """How to split and run. `cuts`: first layers of stages 1, 2, ...; empty: even."""

    stages: int = 2
    cuts: tuple[int, ...] = ()
    threads: int = 1
    run: RunOptions = field(
        default_factory=lambda: RunOptions(context=2048, lanes=4, chunk=128, kv_type="q8_0", flash_attention=True)
    )
    rows_per_microbatch: int = 1
    end_tokens: frozenset[int] = frozenset()

    def serving(self, vocabulary: int) -> ServingOptions:
        """What the head is told."""
        return ServingOptions(
            stages=len(self.cuts) + 1 if self.cuts else self.stages,
            context=self.run.context,
            vocabulary=vocabulary,
            end_tokens=self.end_tokens,
            lanes=self.run.lanes,
            chunk=self.run.chunk,
            rows_per_microbatch=self.rows_per_microbatch,
        )

    def bounds(self, layers: int) -> list[tuple[int, int]]:
        """Layers [first, last) of each stage."""
        cuts = self.cuts or tuple(layers * stage // self.stages for stage in range(1, self.stages))
        edges = [0, *cuts, layers]
        return list(itertools.pairwise(edges))


@dataclass(frozen=True)
class SlicedModel:
    """Files of a split model: what each stage loads."""

    layers: int
    bounds: tuple[tuple[int, int], ...]
    slices: tuple[Path, ...]
    weights: tuple[int, ...]
    """Bytes of the slices without their holes."""
    embedding: Path | None


class Rig:
    """A running pipeline. `stages`, `loaded` and `sliced` by stage."""

    def __init__(
        self, pipeline: HeadPipeline, stages: Sequence[StageProcess], loaded: Sequence[Loaded], sliced: SlicedModel
    ) -> None:
        self.pipeline = pipeline
        self.sliced = sliced
        self.stages = tuple(stages)
        self.loaded = tuple(loaded)
        self._requests = 0

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the stages."""
        return tuple(stage.pid for stage in self.stages)

    async def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling = GREEDY,
        on_token: Callable[[Sampled], None] | None = None,
    ) -> list[Sampled]:
        """All tokens of one generation; `on_token` sees each as it comes."""
        tokens: list[Sampled] = []
        async with self.pipeline.generate(self.request(prompt, max_tokens, sampling)) as stream:
            async for sampled in stream:
                tokens.append(sampled)
                if on_token is not None:
                    on_token(sampled)
        return tokens

    def request(self, prompt: Sequence[int], max_tokens: int, sampling: Sampling = GREEDY) -> Generation:
        """A request with an id of its own."""
        self._requests += 1
        return Generation(f"rig-{self._requests}", tuple(prompt), max_tokens, sampling)

    async def statistics(self) -> list[Statistics]:
        """Counters of each stage."""
        return [await stage.stats() for stage in self.stages]


def slice_model(model: Path, options: RigOptions, folder: Path) -> SlicedModel:
    """Write the slices of `model` into `folder`; one stage runs the file itself. Raises ModelError."""
    opened = open_model(model)
    manifest = build_manifest(opened)
    bounds = options.bounds(manifest.layers)
    if len(bounds) == 1:
        return SlicedModel(manifest.layers, tuple(bounds), (model,), (opened.bytes_total,), None)
    slices: list[Path] = []
    weights: list[int] = []
    with open_artifacts(opened, manifest) as artifacts:
        for first, last in bounds:
            slices.append(folder / f"layers-{first}-{last}.gguf")
            layout = layout_slice(opened.keys, manifest, first, last)
            weights.append(layout.bytes_copied)
            write_slice(layout, artifacts.read, slices[-1])
        embedding = folder / "embedding.gguf"
        write_slice(layout_embedding(opened.keys, manifest), artifacts.read, embedding)
    return SlicedModel(manifest.layers, tuple(bounds), tuple(slices), tuple(weights), embedding)


@asynccontextmanager
async def open_rig(
    model: Path, options: RigOptions | None = None, around: Surroundings | None = None
) -> AsyncIterator[Rig]:
    """Split `model`, start and connect everything; all of it is gone afterwards."""
    options = options or RigOptions()
    with tempfile.TemporaryDirectory(prefix="meshnode-rig-") as folder:
        sliced = await trio.to_thread.run_sync(slice_model, model, options, Path(folder))
        async with open_sliced(sliced, options, around) as rig:
            yield rig


@asynccontextmanager
async def open_sliced(
    sliced: SlicedModel, options: RigOptions, around: Surroundings | None = None
) -> AsyncIterator[Rig]:
    """The same over slices that lie there already: one cut, many starts."""
    around = around or Surroundings()
    mesh = ThrowawayMesh.make()
    async with trio.open_nursery() as nursery, contextlib.AsyncExitStack() as stack:
        stages: list[StageProcess] = []
        for number in range(len(sliced.bounds)):
            name = f"stage {number}"
            stages.append(await StageProcess.spawn(nursery, name, threads=options.threads, on_event=_ignore))
            await stack.enter_async_context(stages[-1])
            around.started(number, stages[-1].pid)
        await _introduce(mesh, stages)
        loaded = [await _load(stage, number, sliced, options) for number, stage in enumerate(stages)]
        hops = [await around.hop(number) for number in range(len(stages) + 1)]
        pipeline = await _connect(nursery, mesh, stages, hops, options.serving(loaded[-1].vocabulary))
        try:
            yield Rig(pipeline, stages, loaded, sliced)
        finally:
            with trio.CancelScope(shield=True):
                await pipeline.aclose()
        for stage in stages:
            await stage.shutdown()
        nursery.cancel_scope.cancel()


def _ignore(_event: Event) -> None:
    """The streams' ends say the same, and the pipeline hears them."""


async def _serve(pipeline: HeadPipeline, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    # Consumers get the StageLost themselves; the rig lives on so that a test can look at it.
    with contextlib.suppress(StageLost):
        await pipeline.run(task_status)


async def _introduce(mesh: ThrowawayMesh, stages: Sequence[StageProcess]) -> None:
    names = [mesh.head_name, *(mesh.stage_name(number) for number in range(len(stages))), mesh.head_name]
    for number, stage in enumerate(stages):
        chain = mesh.chain_for_spki(await stage.prepare(), names[number + 1])
        await stage.credentials(
            Credentials(
                chain=chain,
                root=mesh.root_pem,
                upstream_name=names[number],
                downstream_name=names[number + 2],
                fence=mesh.fence,
            )
        )


async def _load(stage: StageProcess, number: int, sliced: SlicedModel, options: RigOptions) -> Loaded:
    first, last = sliced.bounds[number]
    embedding = sliced.embedding if number == 0 else None
    return await stage.load(
        LoadStage(
            slice_path=str(sliced.slices[number]),
            embedding_path=str(embedding) if embedding else "",
            stage=number,
            stages=len(sliced.bounds),
            first=first,
            last=last,
            layer_count=sliced.layers,
            options=options.run,
            threads=options.threads,
            silence_ms=_SILENCE_MS,
        )
    )


async def _connect(
    nursery: trio.Nursery,
    mesh: ThrowawayMesh,
    stages: Sequence[StageProcess],
    hops: Sequence[tuple[socket.socket, socket.socket]],
    serving: ServingOptions,
) -> HeadPipeline:
    """`hops`: head -> stage 0 -> ... -> last stage -> head."""
    key = Ed25519PrivateKey.generate()
    chain = mesh.chain_for(key.public_key(), mesh.head_name)

    async def own_end(connection: socket.socket, peer: int, *, server: bool) -> HeadStream:
        context = stage_context(server, chain, key, mesh.root_pem)
        return await secure(
            connection, context, lambda der: check_stage_peer(der, mesh.stage_name(peer)), server=server
        )

    async with trio.open_nursery() as connecting:
        for number, stage in enumerate(stages):
            connecting.start_soon(stage.connect, UPSTREAM, hops[number][1])
            connecting.start_soon(stage.connect, DOWNSTREAM, hops[number + 1][0])
        to_first = await own_end(hops[0][0], 0, server=False)
        from_last = await own_end(hops[-1][1], len(stages) - 1, server=True)
        pipeline = HeadPipeline(serving, mesh.fence, to_first, from_last, silence_s=_SILENCE_MS / 1000)
        await nursery.start(_serve, pipeline)
    return pipeline
