"""One file while it is put together from verified artifacts, and what is known of it afterwards.

    <name>.part      the bytes, at their final places
    <name>.journal   the layout's digest, then one line per step: `at ARTIFACT BYTES`, `done ARTIFACT`
    <name>.record    of a finished file: layout, extents, size, time of change (of a part: `<name>.part.record`)

Invariant: `done` is written after the artifact's digest matched and its bytes are on disk (fsync). `at` promises
nothing: a resumed prefix is hashed again from the file, so a lie costs one fetch, never a wrong byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import msgspec

from meshnode.io.artifacts.shapes import ExtentShape, LayoutShape
from meshnode.wire.manifest import Artifact, Manifest

MARK_BYTES = 16 << 20
"""How often the position inside an artifact is noted: at most this much is fetched again after a kill."""

REHASH_BYTES = 4 << 20
"""One read while hashing what a part already holds."""

_DIGITS = 19
"""Of a number in a journal: below 2^63."""


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """An extent, as a record keeps it."""

    artifact: str
    artifact_offset: int
    length: int
    file_offset: int


class Record(msgspec.Struct, frozen=True, array_like=True):
    """A finished file: true as long as size and time of change are those of the file."""

    layout: str
    size: int
    changed_ns: int
    pieces: tuple[Piece, ...]

    def artifacts(self) -> tuple[str, ...]:
        """Names of the artifacts in the file."""
        return tuple(dict.fromkeys(piece.artifact for piece in self.pieces))


def layout_digest(layout: LayoutShape) -> str:
    """Names the exact file that a layout describes, but for the weights."""
    described = (hashlib.sha256(layout.header).digest(), layout.size, _pieces(layout.extents))
    return hashlib.sha256(msgspec.msgpack.encode(described)).hexdigest()


def _pieces(extents: Sequence[ExtentShape]) -> tuple[Piece, ...]:
    return tuple(Piece(item.artifact, item.artifact_offset, item.length, item.file_offset) for item in extents)


def record_path(path: Path) -> Path:
    """Where the record of the finished file `path` lies."""
    return path.with_name(path.name + ".record")


def read_record(path: Path) -> Record | None:
    """The record of a file, whether or not it is still true; None where there is none that can be read."""
    try:
        return msgspec.msgpack.decode(record_path(path).read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError, ValueError):
        return None


def is_unchanged(path: Path, record: Record) -> bool:
    """Whether `path` is the file that the record was written for."""
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (record.size, record.changed_ns)


def places(pieces: Sequence[Piece], artifact: str, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    """(position in the artifact, position in the file, length) of each part of a range of an artifact, in order."""
    for piece in sorted((item for item in pieces if item.artifact == artifact), key=lambda item: item.artifact_offset):
        start = max(offset, piece.artifact_offset)
        end = min(offset + length, piece.artifact_offset + piece.length)
        if start < end:
            yield start, piece.file_offset + start - piece.artifact_offset, end - start


def read_range(path: Path, pieces: Sequence[Piece], artifact: str, offset: int, length: int) -> bytes:
    """A range of an artifact out of a finished file. Errors: OSError, also where the file is too short."""
    with path.open("rb", buffering=0) as file:
        data = b"".join(
            read_exactly(file, position, count) for _, position, count in places(pieces, artifact, offset, length)
        )
    if len(data) != length:
        raise OSError(f"the cached file holds no {length} bytes of {artifact} at {offset}")
    return data


def read_exactly(file: FileIO, position: int, count: int) -> bytes:
    """`count` bytes; OSError at the end of the file. Seeks: `pread` is not everywhere."""
    file.seek(position)
    parts = []
    while count:
        data = file.read(count)
        if not data:
            raise OSError("a cached file is shorter than its record says")
        parts.append(data)
        count -= len(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".tmp")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a rename in `path` last; where directories cannot be opened (Windows) the system does it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Journal:
    """What an earlier attempt wrote down; empty for one that is torn at its first line or not there."""

    layout: str = ""
    done: frozenset[str] = frozenset()
    marks: dict[str, int] = field(default_factory=dict)


def journal_path(path: Path) -> Path:
    """Where the journal of the file `path` (by its final name) lies."""
    return path.with_name(path.name + ".journal")


def read_journal(journal: Path) -> Journal:
    """Any bytes give a journal: lines that make no sense are passed over, as is a torn last one."""
    try:
        title, *lines = journal.read_text(encoding="ascii").split("\n")[:-1]
    except (OSError, UnicodeDecodeError, ValueError):
        return Journal()
    done, marks = set(), {}
    for line in lines:
        match line.split(" "):
            case ["done", name]:
                done.add(name)
            case ["at", name, count] if count.isdigit() and len(count) < _DIGITS:
                marks[name] = int(count)
    return Journal(title.removeprefix("layout "), frozenset(done), marks)


class PartFile:
    """A file in the making. Used from one thread at a time; `close` keeps it for later, `finish` gives it its name."""

    def __init__(self, path: Path, layout: LayoutShape, manifest: Manifest) -> None:
        self.path = path
        self._part = path.with_name(path.name + ".part")
        self._journal = journal_path(path)
        self._layout = layout
        self.pieces = _pieces(layout.extents)
        self._digest = layout_digest(layout)
        names = dict.fromkeys(piece.artifact for piece in self.pieces)
        self.artifacts = {item.name: item for item in manifest.artifacts if item.name in names}
        assert set(self.artifacts) == set(names), "a layout draws from the manifest's artifacts"
        self.done: set[str] = set()
        self._marks: dict[str, int] = {}
        self._file: FileIO | None = None

    def open(self) -> None:
        """Go on where an earlier attempt ended, or begin. Errors: OSError."""
        if self._resume():
            self._file = FileIO(self._part, "r+")
            return
        self._journal.unlink(missing_ok=True)
        self._file = FileIO(self._part, "w+")
        self.write_at(0, self._layout.header)
        self._file.truncate(self._layout.size)
        record = Record(self._digest, self._layout.size, 0, self.pieces)
        write_whole(record_path(self._part), msgspec.msgpack.encode(record))
        self._journal.write_text(f"layout {self._digest}\n")

    def _resume(self) -> bool:
        """Fill `done` and `marks` from a journal of this very layout; False where there is none to go on from."""
        journal = read_journal(self._journal)
        try:
            whole = self._part.stat().st_size == self._layout.size
        except OSError:
            whole = False
        if not whole or journal.layout != self._digest:
            return False
        self.done = set(journal.done & self.artifacts.keys())
        self._marks = {
            name: min(offset, self.artifacts[name].size)
            for name, offset in journal.marks.items()
            if name in self.artifacts
        }
        return True

    def missing(self) -> list[Artifact]:
        """Artifacts that are not there yet, in the manifest's order."""
        return [item for name, item in self.artifacts.items() if name not in self.done]

    def writer(self, artifact: Artifact) -> ArtifactWriter:
        """Takes the bytes of one missing artifact; first call `catch_up` until it says that nothing is left."""
        return ArtifactWriter(self, artifact, self._marks.get(artifact.name, 0))

    @property
    def _opened(self) -> FileIO:
        assert self._file is not None, "open comes first"
        return self._file

    def write_at(self, position: int, data: bytes | memoryview) -> None:
        """All of `data`, at `position` of the part. Errors: OSError."""
        self._opened.seek(position)
        view = memoryview(data)
        while view:
            view = view[self._opened.write(view) :]

    def read_at(self, position: int, count: int) -> bytes:
        """`count` bytes of the part."""
        return read_exactly(self._opened, position, count)

    def mark(self, artifact: str, offset: int) -> None:
        """Note a position inside an artifact."""
        self._note(f"at {artifact} {offset}\n")

    def mark_done(self, artifact: str) -> None:
        """The artifact's digest matched: make its bytes last, then say so."""
        os.fsync(self._opened.fileno())
        self._note(f"done {artifact}\n")
        self.done.add(artifact)

    def _note(self, line: str) -> None:
        with self._journal.open("a") as file:
            file.write(line)

    def finish(self) -> None:
        """Every artifact is done: give the file its name, and write its record."""
        assert not self.missing(), "a file gets its name when it is whole"
        os.fsync(self._opened.fileno())
        stat = os.fstat(self._opened.fileno())
        self.close()
        self._part.replace(self.path)
        record_path(self._part).unlink(missing_ok=True)
        sync_directory(self.path.parent)
        record = Record(self._digest, stat.st_size, stat.st_mtime_ns, self.pieces)
        write_whole(record_path(self.path), msgspec.msgpack.encode(record))
        self._journal.unlink(missing_ok=True)

    def close(self) -> None:
        """Keep what is there for the next attempt."""
        if self._file is not None:
            self._file.close()
            self._file = None


class ArtifactWriter:
    """The bytes of one artifact, hashed in order while they are written to their places."""

    def __init__(self, part: PartFile, artifact: Artifact, resumed: int) -> None:
        self._part = part
        self._artifact = artifact
        self._resumed = resumed
        self._marked = resumed
        self.offset = 0
        self._hash = hashlib.sha256()

    def catch_up(self) -> bool:
        """Hash the next stretch of what an earlier attempt left; False when there is no more."""
        length = min(REHASH_BYTES, self._resumed - self.offset)
        if length <= 0:
            return False
        for _, position, count in places(self._part.pieces, self._artifact.name, self.offset, length):
            self._hash.update(self._part.read_at(position, count))
        self.offset += length
        return True

    def write(self, data: bytes) -> None:
        """The next bytes. Errors: OSError."""
        assert self.offset + len(data) <= self._artifact.size, "a source gives what was asked for"
        view = memoryview(data)
        for start, position, count in places(self._part.pieces, self._artifact.name, self.offset, len(data)):
            self._part.write_at(position, view[start - self.offset : start - self.offset + count])
        self._hash.update(data)
        self.offset += len(data)
        if self.offset - self._marked >= MARK_BYTES:
            self._part.mark(self._artifact.name, self.offset)
            self._marked = self.offset

    def verify(self) -> bool:
        """Whether all bytes are there and match the manifest: then the artifact is done, else it starts anew."""
        if self.offset == self._artifact.size and self._hash.digest() == self._artifact.sha256:
            self._part.mark_done(self._artifact.name)
            return True
        self._part.mark(self._artifact.name, 0)
        self.offset = self._marked = self._resumed = 0
        self._hash = hashlib.sha256()
        return False
