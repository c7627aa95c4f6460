"""What the cache holds: for the inventory, for nodes that ask, for slices that share layers; and what may go.

Everything here reads the disk and belongs in a thread.

Invariant: file names are made from numbers and a checked digest, never from what a peer says.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from meshnode.errors import PeerError
from meshnode.io.artifacts.records import (
    Record,
    is_unchanged,
    journal_path,
    read_journal,
    read_range,
    read_record,
    record_path,
)
from meshnode.wire.manifest import METADATA

MANIFEST_FILE = "manifest.msgpack"
METADATA_FILE = "metadata.gguf"
EMBEDDING_FILE = "embedding.gguf"

SLICES_KEPT = 3
"""Slices of one model that stay: the one in use, one for the plan before, one for the plan while a node is away."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SLICE = re.compile(r"slice-\d{1,4}-\d{1,4}\.gguf")
_FINISHED = re.compile(_SLICE.pattern + r"|embedding\.gguf")
_LARGE = re.compile(rf"({_FINISHED.pattern})(\.part)?")


class Unreadable(OSError):
    """A file of the cache cannot give what its record says."""


@dataclass(frozen=True)
class Held:
    """A finished file of the cache."""

    path: Path
    record: Record

    def read(self, artifact: str, offset: int, length: int) -> bytes:
        """A range of an artifact. Errors: Unreadable."""
        try:
            return read_range(self.path, self.record.pieces, artifact, offset, length)
        except OSError as error:
            raise Unreadable(str(error)) from error


class Holdings:
    """The files below one folder, `<root>/<manifest digest>/`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def directory(self, digest: str) -> Path:
        """Where files of a model lie. Errors: PeerError for what is no digest."""
        if not _DIGEST.fullmatch(digest):
            raise PeerError("not the digest of a manifest")
        return self._root / digest

    def slice_path(self, digest: str, first: int, last: int) -> Path:
        """The file of layers [first, last)."""
        return self.directory(digest) / f"slice-{first}-{last}.gguf"

    def cached(self) -> dict[str, tuple[str, ...]]:
        """Verified artifacts by manifest digest, for the inventory."""
        held = {directory.name: self._held(directory.name) for directory in self._directories()}
        return {
            digest: tuple(sorted({name for file in files for name in file.record.artifacts()}))
            for digest, files in held.items()
            if files
        }

    def manifest_bytes(self, digest: str) -> bytes | None:
        """Canonical bytes of a cached manifest; None where there is none, or a damaged one."""
        try:
            data = (self.directory(digest) / MANIFEST_FILE).read_bytes()
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == digest else None

    def find(self, digest: str, artifact: str) -> tuple[int, Callable[[int, int], bytes]] | None:
        """(size, read(offset, length)) of an artifact in an unchanged file; None where there is none."""
        if artifact == METADATA:
            path = self.directory(digest) / METADATA_FILE
            return (path.stat().st_size, partial(_read_file, path)) if path.is_file() else None
        for file in self._held(digest):
            size = sum(piece.length for piece in file.record.pieces if piece.artifact == artifact)
            if size:
                return size, partial(file.read, artifact)
        return None

    def files_with(self, digest: str, artifact: str) -> list[Held]:
        """Files that should hold an artifact, also touched ones and parts of other plans: check what they give."""
        finished = [file for file in self._held(digest, changed=True) if artifact in file.record.artifacts()]
        parts = []
        for path in _listing(self.directory(digest)):
            if path.suffix == ".part" and artifact in read_journal(journal_path(_final(path))).done:
                record = read_record(path)
                if record is not None:
                    parts.append(Held(path, record))
        return finished + parts

    def touch(self, path: Path) -> None:
        """Note that a finished file is used now."""
        with contextlib.suppress(OSError):
            os.utime(record_path(path))

    def drop_superseded(self, digest: str, in_use: Collection[Path]) -> None:
        """Remove slices of a model beyond SLICES_KEPT, the longest unused first."""
        slices = [path for path in self._by_age([self.directory(digest)]) if _SLICE.match(path.name)]
        spare = [path for path in slices if _final(path) not in in_use]
        for path in spare[: max(0, len(slices) - SLICES_KEPT)]:
            _remove(path)

    def make_room(self, wanted: int, in_use: Collection[Path], free: Callable[[], int]) -> None:
        """Remove what is not in use, the longest unused first, until `free()` is `wanted` bytes, or nothing is left."""
        for path in self._by_age(self._directories()):
            if free() >= wanted:
                return
            if _final(path) not in in_use:
                _remove(path)

    def _by_age(self, directories: Collection[Path]) -> list[Path]:
        """Slices, embeddings and unfinished parts, the longest unused first."""
        found = []
        for directory in directories:
            for path in _listing(directory):
                if _LARGE.fullmatch(path.name):
                    noted = record_path(path) if record_path(path).exists() else path
                    with contextlib.suppress(OSError):
                        found.append((noted.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found)]

    def _directories(self) -> list[Path]:
        return [path for path in _listing(self._root) if _DIGEST.fullmatch(path.name)]

    def _held(self, digest: str, *, changed: bool = False) -> list[Held]:
        files = []
        for path in _listing(self.directory(digest)):
            record = read_record(path) if _FINISHED.fullmatch(path.name) else None
            if record is not None and (changed or is_unchanged(path, record)):
                files.append(Held(path, record))
        return files


def _listing(directory: Path) -> Iterator[Path]:
    try:
        yield from sorted(directory.iterdir())
    except OSError:
        return


def _final(path: Path) -> Path:
    """The name that a part is to get, or the name it has."""
    return path.with_name(path.name.removesuffix(".part"))


def _remove(path: Path) -> None:
    """The file first: a record without its file counts for nothing. What cannot go (open on Windows) stays."""
    with contextlib.suppress(OSError):
        path.unlink()
        record_path(path).unlink(missing_ok=True)
        journal_path(_final(path)).unlink(missing_ok=True)


def _read_file(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)
