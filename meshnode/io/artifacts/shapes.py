"""What this package needs of its neighbours, as structural types: io folders do not import each other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from meshnode.wire.manifest import Manifest

Read = Callable[[str, int, int], bytes]
"""read(artifact, offset, length) -> exactly `length` bytes. Called in threads."""

Sink = Callable[[bytes], Awaitable[None]]
"""Takes the next bytes of an artifact."""

Progress = Callable[[int, int], None]
"""progress(bytes done, bytes in all); called in the event loop."""


class ExtentShape(Protocol):
    """`length` bytes at `artifact_offset` of `artifact` belong at `file_offset` of a file."""

    @property
    def artifact(self) -> str:
        """Name of the artifact."""

    @property
    def artifact_offset(self) -> int:
        """Where in the artifact."""

    @property
    def length(self) -> int:
        """Bytes."""

    @property
    def file_offset(self) -> int:
        """Where in the file."""


class LayoutShape(Protocol):
    """A file: header, extents, size; what neither covers is zeros."""

    @property
    def header(self) -> bytes:
        """What the file begins with."""

    @property
    def extents(self) -> Sequence[ExtentShape]:
        """What comes from artifacts; every artifact it draws from is covered whole."""

    @property
    def size(self) -> int:
        """Bytes of the file."""


class Layouts(Protocol):
    """How the files of a model are laid out, from its metadata artifact (a GGUF without tensors). Called in threads."""

    def slice(self, metadata: Path, manifest: Manifest, first: int, last: int) -> LayoutShape:
        """The slice file of layers [first, last). Errors: ModelError."""

    def embedding(self, metadata: Path, manifest: Manifest) -> LayoutShape:
        """The file that stage 0 looks tokens up in. Errors: ModelError."""


class Source(Protocol):
    """Somebody who has a model: a peer, or this node's own file."""

    @property
    def label(self) -> str:
        """Who it is, for errors."""

    @property
    def remote(self) -> bool:
        """Whether its bytes come over the network."""

    async def manifest(self, digest: str) -> bytes:
        """The manifest's canonical bytes."""

    async def fetch(self, digest: str, artifact: str, offset: int, length: int, sink: Sink) -> None:
        """Give `length` bytes from `offset` of `artifact` to `sink`, in order."""


class ByteStream(Protocol):
    """An authenticated BULK stream (io.transport.Stream)."""

    async def send_frame(self, payload: bytes) -> None:
        """One frame, whole."""

    async def receive_frame(self) -> bytes:
        """The next frame. Errors: LinkLost, PeerError."""

    async def send_bytes(self, data: bytes) -> None:
        """Raw bytes."""

    async def receive_bytes(self, count: int) -> bytes:
        """Exactly `count` raw bytes."""
