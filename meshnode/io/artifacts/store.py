"""The node's cache of model slices: `<root>/<manifest digest>/`.

    manifest.msgpack, metadata.gguf, embedding.gguf, slice-<first>-<last>.gguf      with their records (see part)

Invariant: file names are made here from numbers and a checked digest, never from what a peer says.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from meshnode.errors import ConfigError, Lost, MeshError, PeerError, Unavailable
from meshnode.io.artifacts.part import (
    REHASH_BYTES,
    ArtifactWriter,
    PartFile,
    Record,
    is_unchanged,
    layout_digest,
    read_range,
    read_record,
    write_whole,
)
from meshnode.io.artifacts.shapes import Layouts, LayoutShape, Progress, Source
from meshnode.wire.manifest import METADATA, Artifact, Manifest, ManifestDigest, decode_manifest

_T = TypeVar("_T")

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILES = re.compile(r"(slice-\d{1,4}-\d{1,4}|embedding)\.gguf")
_MANIFEST = "manifest.msgpack"
_METADATA = "metadata.gguf"

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


class ArtifactStore:
    """Gives stages their files, and other nodes what the files hold. Safe for any number of tasks."""

    def __init__(self, root: Path, layouts: Layouts) -> None:
        self._root = root
        self._layouts = layouts
        self._locks: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)

    def directory(self, digest: str) -> Path:
        """Where files of a model lie. Errors: PeerError for what is no digest."""
        if not _DIGEST.fullmatch(digest):
            raise PeerError("not the digest of a manifest")
        return self._root / digest

    def slice_path(self, digest: str, first: int, last: int) -> Path:
        """The file of layers [first, last)."""
        return self.directory(digest) / f"slice-{first}-{last}.gguf"

    async def prepare(
        self, digest: str, first: int, last: int, sources: Sequence[Source], progress: Progress | None = None
    ) -> PreparedSlice:
        """Have the slice [first, last) and what goes with it, verified; cached files first, then `sources` in order.

        Cancelled or failed, it goes on next time where it was. Errors: PeerError (wrong bytes, refusals), LinkLost,
        ConfigError (disk), ModelError (this slice cannot be laid out).
        """
        tally = _Tally(digest, sources, progress)
        try:
            async with self._locks[digest]:
                return await self._prepare(tally, first, last)
        except OSError as error:
            raise _disk_error(error, tally.total - tally.done) from error

    async def manifest(self, digest: str, sources: Sequence[Source]) -> Manifest:
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
        await trio.to_thread.run_sync(write_whole, directory / _MANIFEST, data)
        return manifest

    async def metadata(self, digest: str, sources: Sequence[Source]) -> Path:
        """A GGUF of all key-values and no tensors: what a tokenizer loads. Errors as of `prepare`."""
        manifest = await self.manifest(digest, sources)
        path = self.directory(digest) / _METADATA
        wanted = manifest.artifact(METADATA)
        assert wanted is not None, "a checked manifest has metadata"
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
        manifest = await self.manifest(digest, tally.sources)
        metadata = await self.metadata(digest, tally.sources)
        path = self.slice_path(digest, first, last)
        embedding = self.directory(digest) / "embedding.gguf" if first == 0 and last < manifest.layers else None
        files = [(path, partial(self._layouts.slice, metadata, manifest, first, last))]
        if embedding is not None:
            files.append((embedding, partial(self._layouts.embedding, metadata, manifest)))
        parts: list[PartFile] = []
        try:
            for file, lay_out in files:
                part = await trio.to_thread.run_sync(_open_part, file, lay_out, manifest)
                if part is not None:
                    parts.append(part)
            missing = sum(item.size for part in parts for item in part.missing())
            tally.total = sum(item.size for part in parts for item in part.artifacts.values())
            tally.done = tally.total - missing
            self._check_space(missing)
            tally.show()
            for part in parts:
                await self._assemble(part, tally)
        finally:
            for part in parts:
                part.close()
        return PreparedSlice(path, embedding, metadata, manifest, tally.fetched, tally.copied)

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
        for file in await trio.to_thread.run_sync(self._files_with, tally.digest, artifact.name):
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

    async def _copied(self, writer: ArtifactWriter, artifact: Artifact, file: _Held, tally: _Tally) -> bool:
        """Copy an artifact out of another file of the cache; False when that file does not have it right any more."""
        begun = writer.offset
        try:
            for at in range(begun, artifact.size, REHASH_BYTES):
                count = min(REHASH_BYTES, artifact.size - at)
                data = await trio.to_thread.run_sync(file.read, artifact.name, at, count)
                await trio.to_thread.run_sync(writer.write, data)
                tally.show(writer.offset)
        except _Unreadable:
            pass
        held = writer.offset
        if not await trio.to_thread.run_sync(writer.verify):
            return False
        tally.copied += held - begun
        return True

    def _check_space(self, missing: int) -> None:
        free = shutil.disk_usage(self._root).free
        if missing and free < missing + SPARE_BYTES:
            raise _disk_full(missing + SPARE_BYTES - free)

    # --- what the cache holds: read by the inventory and by those who ask for artifacts; all of it reads the disk

    def cached(self) -> dict[str, tuple[str, ...]]:
        """Verified artifacts by manifest digest, for the inventory."""
        if not self._root.is_dir():
            return {}
        digests = sorted(path.name for path in self._root.iterdir() if _DIGEST.fullmatch(path.name))
        held = {digest: self._held(digest) for digest in digests}
        return {
            digest: tuple(sorted({name for file in files for name in file.record.artifacts()}))
            for digest, files in held.items()
            if files
        }

    def manifest_bytes(self, digest: str) -> bytes | None:
        """Canonical bytes of a cached manifest; None where there is none, or a damaged one."""
        try:
            data = (self.directory(digest) / _MANIFEST).read_bytes()
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == digest else None

    def find(self, digest: str, artifact: str) -> tuple[int, Callable[[int, int], bytes]] | None:
        """(size, read(offset, length)) of an artifact in an unchanged file; None where there is none."""
        if artifact == METADATA:
            path = self.directory(digest) / _METADATA
            return (path.stat().st_size, partial(_read_file, path)) if path.is_file() else None
        for file in self._held(digest):
            size = sum(piece.length for piece in file.record.pieces if piece.artifact == artifact)
            if size:
                return size, partial(file.read, artifact)
        return None

    def _files_with(self, digest: str, artifact: str) -> list[_Held]:
        return [file for file in self._held(digest, changed=True) if artifact in file.record.artifacts()]

    def _held(self, digest: str, *, changed: bool = False) -> list[_Held]:
        """Finished files of a model; with `changed` also those that somebody touched, whose bytes need checking."""
        directory = self.directory(digest)
        if not directory.is_dir():
            return []
        files = []
        for path in sorted(directory.iterdir()):
            record = read_record(path) if _FILES.fullmatch(path.name) else None
            if record is not None and (changed or is_unchanged(path, record)):
                files.append(_Held(path, record))
        return files


class _Unreadable(OSError):
    """A file of the cache cannot give what its record says."""


@dataclass(frozen=True)
class _Held:
    """A finished file of the cache."""

    path: Path
    record: Record

    def read(self, artifact: str, offset: int, length: int) -> bytes:
        try:
            return read_range(self.path, self.record.pieces, artifact, offset, length)
        except OSError as error:
            raise _Unreadable from error


def _open_part(path: Path, lay_out: Callable[[], LayoutShape], manifest: Manifest) -> PartFile | None:
    """The file in the making; None when it is finished and unchanged."""
    layout = lay_out()
    record = read_record(path)
    if record is not None and record.layout == layout_digest(layout) and is_unchanged(path, record):
        return None
    part = PartFile(path, layout, manifest)
    part.open()
    return part


def _has_digest(path: Path, wanted: Artifact) -> bool:
    try:
        return path.stat().st_size == wanted.size and hashlib.sha256(path.read_bytes()).digest() == wanted.sha256
    except OSError:
        return False


def _read_file(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


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
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(missing)
    return ConfigError(
        f"the artifact cache cannot be used: {error.strerror or error}", "Check the data directory and its disk."
    )
