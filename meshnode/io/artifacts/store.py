"""Have a slice: from what the cache holds, then from who has the model.

    <root>/<manifest digest>/  manifest.msgpack, metadata.gguf, embedding.gguf, slice-<first>-<last>.gguf

Invariant: what `prepare` returns was verified artifact by artifact, and nobody changed it since.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from meshnode.errors import ConfigError, Lost, MeshError, PeerError, Unavailable
from meshnode.io.artifacts.holdings import EMBEDDING_FILE, MANIFEST_FILE, METADATA_FILE, Held, Holdings, Unreadable
from meshnode.io.artifacts.part import REHASH_BYTES, ArtifactWriter, PartFile
from meshnode.io.artifacts.records import is_unchanged, layout_digest, read_record, write_whole
from meshnode.io.artifacts.shapes import Layouts, LayoutShape, Progress, Source
from meshnode.wire.manifest import METADATA, Artifact, Manifest, ManifestDigest, decode_manifest

_T = TypeVar("_T")

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))

METADATA_BYTES = 128 << 20
"""Held in memory until it is verified; 262,144 tokens with merges take 20 MB."""

SPARE_BYTES = 64_000_000
"""Left free on the disk: journals, records and the node's own state must stay writable."""


@dataclass(frozen=True)
class PreparedSlice:
    """Files that a stage loads, and what it cost to have them."""

    path: Path
    embedding: Path | None
    """For stage 0 of a split; a whole model holds its embedding itself."""
    metadata: Path
    manifest: Manifest
    fetched_bytes: int
    """Weight bytes that came over the network."""
    copied_bytes: int
    """Weight bytes copied from files of this node."""


@dataclass
class _Tally:
    """One preparation: who gives, and how far it is."""

    digest: str
    sources: Sequence[Source]
    progress: Progress | None
    total: int = 0
    done: int = 0
    fetched: int = 0
    copied: int = 0

    def show(self, further: int = 0) -> None:
        if self.progress is not None:
            self.progress(self.done + further, self.total)


class ArtifactStore(Holdings):
    """Gives stages their files, and other nodes what the files hold. Safe for any number of tasks."""

    def __init__(self, root: Path, layouts: Layouts) -> None:
        super().__init__(root)
        self._layouts = layouts
        self._locks: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)
        self._users: Counter[Path] = Counter()
        """Of files that must not go: preparations under way, and whoever has not said `release`."""

    async def prepare(
        self, digest: str, first: int, last: int, sources: Sequence[Source], progress: Progress | None = None
    ) -> PreparedSlice:
        """Have the slice [first, last) and what goes with it, verified; cached files first, then `sources` in order.

        The files stay until `release`. Cancelled or failed, it goes on next time where it was. Errors: PeerError (wrong
        bytes, refusals), LinkLost, ConfigError (disk), ModelError (this slice cannot be laid out).
        """
        tally = _Tally(digest, sources, progress)
        self.directory(digest)
        turn = self._locks[digest]
        try:
            async with turn:
                return await self._prepare(tally, first, last)
        except OSError as error:
            raise _disk_error(error, tally.total - tally.done) from error
        finally:
            if not turn.locked():  # nobody waits either: a coordinator may name any number of digests
                self._locks.pop(digest, None)

    def release(self, *files: Path | None) -> None:
        """One user less of each of these files, which `prepare` gave; what nobody uses may make room for others."""
        for file in files:
            if file is not None and file in self._users:
                self._users[file] -= 1
                if not self._users[file]:
                    del self._users[file]

    async def _manifest(self, digest: str, sources: Sequence[Source]) -> Manifest:
        """The manifest, cached or from the first source that has it."""
        cached = await trio.to_thread.run_sync(self.manifest_bytes, digest)
        if cached is not None:
            return decode_manifest(cached)

        async def ask(source: Source) -> tuple[Manifest, bytes]:
            data = await source.manifest(digest)
            return decode_manifest(data, ManifestDigest(digest)), data

        manifest, data = await _first_that_can(sources, ask)
        directory = self.directory(digest)
        await trio.to_thread.run_sync(partial(directory.mkdir, parents=True, exist_ok=True))
        await trio.to_thread.run_sync(write_whole, directory / MANIFEST_FILE, data)
        return manifest

    async def _metadata(self, digest: str, sources: Sequence[Source]) -> Path:
        """A GGUF of all key-values and no tensors: what a tokenizer loads. Errors as of `prepare`."""
        manifest = await self._manifest(digest, sources)
        path = self.directory(digest) / METADATA_FILE
        wanted = manifest.artifact(METADATA)
        assert wanted is not None, "a checked manifest has metadata"
        if wanted.size > METADATA_BYTES:
            raise PeerError(f"the manifest names {wanted.size} bytes of metadata")
        if await trio.to_thread.run_sync(_has_digest, path, wanted):
            return path

        async def ask(source: Source) -> bytes:
            parts: list[bytes] = []

            async def keep(data: bytes) -> None:
                parts.append(data)

            await source.fetch(digest, METADATA, 0, wanted.size, keep)
            data = b"".join(parts)
            if hashlib.sha256(data).digest() != wanted.sha256:
                raise _wrong_bytes(METADATA, source)
            return data

        data = await _first_that_can(sources, ask)
        await trio.to_thread.run_sync(write_whole, path, data)
        return path

    async def _prepare(self, tally: _Tally, first: int, last: int) -> PreparedSlice:
        digest = tally.digest
        manifest = await self._manifest(digest, tally.sources)
        metadata = await self._metadata(digest, tally.sources)
        path = self.slice_path(digest, first, last)
        embedding = self.directory(digest) / EMBEDDING_FILE if first == 0 and last < manifest.layers else None
        files = [(path, partial(self._layouts.slice, metadata, manifest, first, last))]
        if embedding is not None:
            files.append((embedding, partial(self._layouts.embedding, metadata, manifest)))
        self._users.update(file for file, _ in files)
        try:
            await self._put_together(tally, manifest, files)
            await trio.to_thread.run_sync(self.drop_superseded, digest, frozenset(self._users))
        except BaseException:
            self.release(path, embedding)
            raise
        return PreparedSlice(path, embedding, metadata, manifest, tally.fetched, tally.copied)

    async def _put_together(
        self, tally: _Tally, manifest: Manifest, files: Sequence[tuple[Path, Callable[[], LayoutShape]]]
    ) -> None:
        """Have every file whole, from what lies here and from the sources."""
        parts: list[PartFile] = []
        try:
            for file, lay_out in files:
                part = await trio.to_thread.run_sync(_open_part, file, lay_out, manifest)
                if part is not None:
                    parts.append(part)
            missing = sum(item.size for part in parts for item in part.missing())
            tally.total = sum(item.size for part in parts for item in part.artifacts.values())
            tally.done = tally.total - missing
            await trio.to_thread.run_sync(self._check_space, missing)
            tally.show()
            for part in parts:
                await self._assemble(part, tally)
        finally:
            for part in parts:
                part.close()
        for file, _ in files:
            await trio.to_thread.run_sync(self.touch, file)

    async def _assemble(self, part: PartFile, tally: _Tally) -> None:
        for artifact in part.missing():
            writer = part.writer(artifact)
            while await trio.to_thread.run_sync(writer.catch_up):
                tally.show(writer.offset)
            await self._fill(writer, artifact, tally)
            tally.done += artifact.size
            tally.show()
        await trio.to_thread.run_sync(part.finish)

    async def _fill(self, writer: ArtifactWriter, artifact: Artifact, tally: _Tally) -> None:
        """Get one artifact: from this node's own files if any has it right, else from the sources in order."""
        for file in await trio.to_thread.run_sync(self.files_with, tally.digest, artifact.name):
            if await self._copied(writer, artifact, file, tally):
                return

        async def ask(source: Source) -> None:
            for _ in range(2):  # wrong bytes once: the prefix of an earlier attempt, or an accident; twice: the source
                await self._transfer(writer, artifact, source, tally)
                if await trio.to_thread.run_sync(writer.verify):
                    return
            raise _wrong_bytes(artifact.name, source)

        await _first_that_can(tally.sources, ask)

    async def _transfer(self, writer: ArtifactWriter, artifact: Artifact, source: Source, tally: _Tally) -> None:
        begun = writer.offset

        async def sink(data: bytes) -> None:
            await trio.to_thread.run_sync(writer.write, data)
            tally.show(writer.offset)

        try:
            if begun < artifact.size:
                await source.fetch(tally.digest, artifact.name, begun, artifact.size - begun, sink)
        finally:
            if source.remote:
                tally.fetched += writer.offset - begun
            else:
                tally.copied += writer.offset - begun

    async def _copied(self, writer: ArtifactWriter, artifact: Artifact, file: Held, tally: _Tally) -> bool:
        """Copy an artifact out of another file of the cache; False when that file does not have it right any more."""
        begun = writer.offset
        try:
            for at in range(begun, artifact.size, REHASH_BYTES):
                count = min(REHASH_BYTES, artifact.size - at)
                data = await trio.to_thread.run_sync(file.read, artifact.name, at, count)
                await trio.to_thread.run_sync(writer.write, data)
                tally.show(writer.offset)
        except Unreadable:
            pass
        held = writer.offset
        if not await trio.to_thread.run_sync(writer.verify):
            return False
        tally.copied += held - begun
        return True

    def _check_space(self, missing: int) -> None:
        """Room for what is missing, at the cost of what nobody here uses. Errors: ConfigError."""

        def free() -> int:
            return shutil.disk_usage(self._root).free

        wanted = missing + SPARE_BYTES
        if missing and free() < wanted:
            self.make_room(wanted, frozenset(self._users), free)
            if (found := free()) < wanted:
                raise _disk_full(wanted - found)


def _open_part(path: Path, lay_out: Callable[[], LayoutShape], manifest: Manifest) -> PartFile | None:
    """The file in the making; None when it is finished and unchanged."""
    layout = lay_out()
    record = read_record(path)
    if record is not None and record.layout == layout_digest(layout) and is_unchanged(path, record):
        return None
    part = PartFile(path, layout, manifest)
    try:
        part.open()
    except OSError:
        part.close()
        raise
    return part


def _has_digest(path: Path, wanted: Artifact) -> bool:
    try:
        return path.stat().st_size == wanted.size and hashlib.sha256(path.read_bytes()).digest() == wanted.sha256
    except OSError:
        return False


async def _first_that_can(sources: Sequence[Source], ask: Callable[[Source], Awaitable[_T]]) -> _T:
    """The first answer; the last error where nobody answers."""
    failure: MeshError = Unavailable("nobody was named who has the model")
    for source in sources:
        try:
            return await ask(source)
        except (PeerError, Lost) as error:
            failure = error
    raise failure


def _wrong_bytes(artifact: str, source: Source) -> PeerError:
    return PeerError(f"the artifact {artifact} from {source.label} does not match the manifest (SHA-256 differs)")


def _disk_full(missing: int) -> ConfigError:
    return ConfigError(
        f"the disk of the data directory is full: {missing / 1e9:.2f} GB more are needed for this slice",
        "Free some space and start again (what was fetched is kept), or choose another place with --data.",
    )


def _disk_error(error: OSError, missing: int) -> ConfigError:
    if error.errno in _FULL:
        return _disk_full(missing)
    return ConfigError(
        f"the artifact cache cannot be used: {error.strerror or error}", "Check the data directory and its disk."
    )
