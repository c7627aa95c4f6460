"""What is known of a file of the cache: of a finished one by its record, of one in the making by its journal.

Invariant: reading either survives any bytes; what they say of weights is checked against the manifest's digests.
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
    described = (hashlib.sha256(layout.header).digest(), layout.size, pieces_of(layout.extents))
    return hashlib.sha256(msgspec.msgpack.encode(described)).hexdigest()


def pieces_of(extents: Sequence[ExtentShape]) -> tuple[Piece, ...]:
    """Extents as a record keeps them."""
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
