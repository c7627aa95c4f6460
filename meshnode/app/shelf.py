"""Models whose file lies on this node, and the slices that its stages load.

Hashing a model takes as long as reading it, so the manifest is remembered for as long as the file is the same by
path, size, time and inode.

Invariant: everything that reads a file runs in a thread, and a model is offered to others only after it was hashed.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import trio

from meshnode.app.stages import SlicePaths
from meshnode.core.planning.context import costs_of
from meshnode.core.planning.footprint import KV_BLOCK_BYTES, ModelFootprint
from meshnode.core.serving.text import Vocabulary
from meshnode.errors import Lost, ModelError, PeerError, StageError, Unavailable
from meshnode.identity.ids import NodeId, short
from meshnode.io.artifacts import ArtifactStore, BulkClient, Library, ModelSource, PreparedSlice
from meshnode.io.artifacts.holdings import METADATA_FILE
from meshnode.io.artifacts.shapes import Sink, Source
from meshnode.io.disk.atomic import write_atomic
from meshnode.io.llama.footprint import footprint_of, footprint_of_parts
from meshnode.io.llama.gguf_file import GgufModel, open_model
from meshnode.io.llama.manifest import ModelArtifacts, build_manifest, described, open_artifacts
from meshnode.io.llama.slicing import SliceLayout, layout_embedding, layout_slice
from meshnode.io.stage.tokenizer import Tokenizer
from meshnode.wire.limits import LANES, MICROBATCH_ROWS
from meshnode.wire.manifest import LAYER_PREFIX, METADATA, Manifest, decode_manifest, encode_manifest, manifest_digest
from meshnode.wire.messages import Prepare

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


OpenBulk = Callable[[NodeId], AbstractAsyncContextManager[BulkClient]]
"""A connection that asks a node for artifacts."""

READERS = 1
"""Files whose headers are read at once. Parsing is Python: every such thread that is ready to run keeps the event loop
waiting for the interpreter's switch interval (app/pulse.SWITCH_S). 100 files at once held it up for 1.6 s; one by one
they take about the same time, and `meshnode bench scan` says how late the loop is."""


FOOTPRINTS = 16
"""Models whose costs are remembered; to read them again takes as long as a vocabulary, 0.2 s at most."""


@dataclass(frozen=True)
class LocalModel:
    """A GGUF file of this node, hashed and understood."""

    path: Path
    name: str
    manifest: Manifest
    digest: str
    footprint: ModelFootprint


@dataclass(frozen=True)
class ServableModel:
    """A local model with a tokenizer process: what a head needs."""

    local: LocalModel
    tokenizer: Tokenizer

    @property
    def vocabulary(self) -> Vocabulary:
        """What the model's tokens say."""
        return self.tokenizer.vocabulary


class GgufLayouts:
    """io.artifacts.Layouts by the slicing rules of io.llama."""

    def slice(self, metadata: Path, manifest: Manifest, first: int, last: int) -> SliceLayout:
        """Layers [first, last)."""
        return layout_slice(open_model(metadata).keys, manifest, first, last)

    def embedding(self, metadata: Path, manifest: Manifest) -> SliceLayout:
        """The token embedding alone."""
        return layout_embedding(open_model(metadata).keys, manifest)


class Remote:
    """Another node as a source of bytes, connected when it is asked first."""

    remote = True

    def __init__(self, node: NodeId, open_bulk: OpenBulk, stack: AsyncExitStack) -> None:
        self.label = short(node)
        self._node = node
        self._open_bulk = open_bulk
        self._stack = stack
        self._client: BulkClient | None = None
        self._problem: Lost | None = None

    async def manifest(self, digest: str) -> bytes:
        """As of io.artifacts.Source."""
        return await (await self._connected()).manifest(digest)

    async def fetch(self, digest: str, artifact: str, offset: int, length: int, sink: Sink) -> None:
        """As of io.artifacts.Source."""
        await (await self._connected()).fetch(digest, artifact, offset, length, sink)

    async def _connected(self) -> BulkClient:
        if self._problem is not None:
            raise self._problem  # one dial for each preparation: others may have the bytes
        if self._client is None:
            try:
                self._client = await self._stack.enter_async_context(self._open_bulk(self._node))
            except Lost as error:
                self._problem = error
                raise
            self.label = self._client.label
        return self._client


class Shelf:
    """Local models, and slices from them, from the cache, or from the node that has the file."""

    def __init__(self, cache: Path, open_bulk: OpenBulk, own: NodeId) -> None:
        self._hashed = cache / "hashed"
        self._open_bulk = open_bulk
        self._own = own
        self._models: dict[str, LocalModel] = {}
        self._sources: dict[str, ModelSource] = {}
        self.store = ArtifactStore(cache, GgufLayouts())
        self.library = Library(self.store)
        self._files: dict[str, ModelArtifacts] = {}
        self._footprints: dict[str, ModelFootprint] = {}
        self._readers = trio.CapacityLimiter(READERS)
        self.fetched_bytes = 0
        """Weight bytes that came from other nodes since this one started."""

    async def open(self, path: Path, progress: Callable[[int, int], None]) -> LocalModel:
        """Read, hash and offer a model file. `progress(bytes done, total)` may be called from a thread.

        Raises ModelError for anything that is no usable GGUF.
        """
        reading = partial(self._open, path, progress)
        model, local = await trio.to_thread.run_sync(reading, abandon_on_cancel=True, limiter=self._readers)
        # Not abandoned: somebody has to close them.
        files = await trio.to_thread.run_sync(open_artifacts, model, local.manifest, limiter=self._readers)
        source = ModelSource(local.manifest, files.read)
        self._drop(local.digest)
        self._models[local.digest], self._files[local.digest] = local, files
        self._sources[local.digest] = source
        self.library.add(source)
        return local

    def keep(self, digests: Collection[str]) -> None:
        """Let go of the files of all other models: each holds descriptors of this process."""
        for digest in self._files.keys() - digests:
            self._drop(digest)

    def close(self) -> None:
        """Let go of the model files; nothing is offered any more."""
        self.keep(())

    def _drop(self, digest: str) -> None:
        files = self._files.pop(digest, None)
        if files is not None:
            del self._models[digest], self._sources[digest]
            self.library.remove(digest)
            files.close()

    async def obtain(self, order: Prepare, progress: Callable[[int, int], None]) -> SlicePaths:
        """The files that `order` needs. Raises MeshError."""
        local = self._models.get(order.manifest_digest)
        if local is not None and order.first == 0 and order.last == order.layers == len(local.footprint.layers):
            return SlicePaths(local.path, needed_bytes=needed_bytes(local.footprint, order))
        own = self._sources.get(order.manifest_digest)
        if own is not None:
            return await self._prepare(order, [own], progress)
        named = dict.fromkeys((order.source, *order.sources))
        async with AsyncExitStack() as stack:
            sources: list[Source] = [Remote(node, self._open_bulk, stack) for node in named if node != self._own]
            return await self._prepare(order, sources, progress)

    def release(self, paths: SlicePaths) -> None:
        """A stage that got these files uses them no more."""
        self.store.release(paths.slice, paths.embedding)

    async def cached(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Slices on disk, whole and verified: layer ranges by manifest digest."""
        return await trio.to_thread.run_sync(self._cached)

    def _cached(self) -> dict[str, tuple[tuple[int, int], ...]]:
        held = {digest: _ranges(names) for digest, names in self.store.cached().items()}
        return held | {digest: ((0, local.manifest.layers),) for digest, local in self._models.items()}

    @property
    def offered(self) -> frozenset[str]:
        """Manifests of the models whose file is open here."""
        return frozenset(self._models)

    async def find(self, digest: str, name: str) -> LocalModel:
        """What a head needs of a model: its file, or what lies beside the slices. Raises MeshError."""
        local = self._models.get(digest)
        if local is not None:
            return local
        return await trio.to_thread.run_sync(self._described, digest, name, limiter=self._readers)

    def _described(self, digest: str, name: str) -> LocalModel:
        data, found = self.store.manifest_bytes(digest), self.store.find(digest, METADATA)
        if data is None or found is None:
            raise ModelError(f"nothing of {name} lies on this node")
        manifest = decode_manifest(data)
        wanted = manifest.artifact(METADATA)
        if wanted is None or hashlib.sha256(found[1](0, found[0])).digest() != wanted.sha256:
            raise ModelError(f"the metadata of {name} on this node's disk was changed")
        path = self.store.directory(digest) / METADATA_FILE
        return LocalModel(path, name, manifest, digest, footprint_of(described(path, manifest), digest, name))

    def remembered(self, digest: str) -> Path | None:
        """The file in which this model was when it was hashed, if there is one still."""
        try:
            path = Path((self._hashed / f"{digest}.path").read_text())
        except (OSError, ValueError):
            return None
        return path if path.is_file() else None

    async def _prepare(self, order: Prepare, sources: list[Source], progress: Callable[[int, int], None]) -> SlicePaths:
        prepared = await self.store.prepare(order.manifest_digest, order.first, order.last, sources, progress)
        self.fetched_bytes += prepared.fetched_bytes
        try:
            return SlicePaths(prepared.path, prepared.embedding, await self._needed(order, prepared))
        except BaseException:
            self.store.release(prepared.path, prepared.embedding)
            raise

    async def _needed(self, order: Prepare, prepared: PreparedSlice) -> int:
        if prepared.manifest.layers != order.layers:
            raise PeerError("the order names another number of layers than the manifest")
        digest = order.manifest_digest
        if digest not in self._footprints:
            reading = partial(footprint_of_parts, prepared.metadata, prepared.manifest, digest)
            found = await trio.to_thread.run_sync(reading, limiter=self._readers)
            self._footprints = (
                {**self._footprints, digest: found} if len(self._footprints) < FOOTPRINTS else {digest: found}
            )
        return needed_bytes(self._footprints[digest], order)

    def _open(self, path: Path, progress: Callable[[int, int], None]) -> tuple[GgufModel, LocalModel]:
        model = open_model(path)
        name = model_name(path)
        footprint_of(model, "", name)  # what cannot be planned is said before an hour of hashing
        manifest = self._manifest(model, progress)
        digest = manifest_digest(manifest)
        with contextlib.suppress(OSError):  # a full disk: the next start has to be told the file again, no more
            write_atomic(self._hashed / f"{digest}.path", str(path.absolute()).encode())
        return model, LocalModel(path, name, manifest, digest, footprint_of(model, digest, name))

    def _manifest(self, model: GgufModel, progress: Callable[[int, int], None]) -> Manifest:
        remembered = self._hashed / f"{_identity(model)}.msgpack"
        try:
            return decode_manifest(remembered.read_bytes())
        except (OSError, PeerError):
            pass

        def report(done: int, total: int) -> bool:
            progress(done, total)
            return True

        manifest = build_manifest(model, report)
        self._hashed.mkdir(parents=True, exist_ok=True)
        write_atomic(remembered, encode_manifest(manifest))
        return manifest


def needed_bytes(footprint: ModelFootprint, order: Prepare) -> int:
    """What the stage of `order` takes, by the same rule as the planner's. Raises StageError("bad_options")."""
    options = order.options
    possible = options.context >= 1 and 1 <= options.lanes <= LANES and 1 <= options.chunk <= MICROBATCH_ROWS
    if not possible or options.kv_type not in KV_BLOCK_BYTES:
        raise StageError("bad_options", f"no stage runs with {options}")
    return costs_of(footprint, options.context, options.lanes, options.kv_type).need(order.first, order.last)


def model_name(path: Path) -> str:
    """What clients call the model at `path`: the file's name, of several files without their numbers."""
    return _SHARD.sub("", path.stem)


def _ranges(names: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Runs of layers among artifact names: (first, last) with last excluded."""
    layers = sorted(int(name.removeprefix(LAYER_PREFIX)) for name in names if name.startswith(LAYER_PREFIX))
    found: list[tuple[int, int]] = []
    for layer in layers:
        if found and found[-1][1] == layer:
            found[-1] = (found[-1][0], layer + 1)
        else:
            found.append((layer, layer + 1))
    return tuple(found)


def _identity(model: GgufModel) -> str:
    """What tells that a model's files are the ones that were hashed."""
    parts = []
    for path in model.files:
        try:
            found = path.stat()
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}") from None
        parts.append((str(path.absolute()), found.st_size, found.st_mtime_ns, found.st_ino))
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]


def unavailable(model: str) -> Unavailable:
    """Nobody serves `model` at this moment."""
    return Unavailable(f"{model} is not served at the moment: it is loading, or a machine of its pipeline is away")
