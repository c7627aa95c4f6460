"""One file while it is put together from verified artifacts, and what is known of it afterwards.

    <name>.part      the bytes, at their final places
    <name>.journal   the layout's digest, then one line per step: `at ARTIFACT BYTES`, `done ARTIFACT`
    <name>.record    of a finished file: layout, extents, size, time of change (of a part: `<name>.part.record`)

Invariant: `done` is written after the artifact's digest matched and its bytes are on disk (fsync). `at` promises
nothing: a resumed prefix is hashed again from the file, so a lie costs one fetch, never a wrong byte.
"""

from __future__ import annotations

import hashlib
import os
from io import FileIO
from pathlib import Path

import msgspec

from meshnode.io.artifacts.records import (
    Record,
    journal_path,
    layout_digest,
    pieces_of,
    places,
    read_exactly,
    read_journal,
    record_path,
    sync_directory,
    write_whole,
)
from meshnode.io.artifacts.shapes import LayoutShape
from meshnode.wire.manifest import Artifact, Manifest

MARK_BYTES = 16 << 20
"""How often the position inside an artifact is noted: at most this much is fetched again after a kill."""

REHASH_BYTES = 4 << 20
"""One read while hashing what a part already holds."""


class PartFile:
    """A file in the making. Used from one thread at a time; `close` keeps it for later, `finish` gives it its name."""

    def __init__(self, path: Path, layout: LayoutShape, manifest: Manifest) -> None:
        self.path = path
        self._part = path.with_name(path.name + ".part")
        self._journal = journal_path(path)
        self._layout = layout
        self.pieces = pieces_of(layout.extents)
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
            # No digest vouches for the header, and it is on disk for sure only with the first artifact.
            self.write_at(0, self._layout.header)
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
