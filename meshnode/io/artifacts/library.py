"""What this node can give to others: models whose file it has, and what its cache holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from meshnode.errors import PeerError
from meshnode.io.artifacts.shapes import Read, Sink
from meshnode.wire.manifest import Manifest, encode_manifest, manifest_digest

_READ_BYTES = 4 << 20
"""One read of a local file: large enough for the disk, small enough to cancel within milliseconds."""


class ModelSource:
    """A model that lies on this node as a file; `read` gives ranges of its artifacts."""

    remote = False
    label = "this node's model file"

    def __init__(self, manifest: Manifest, read: Read) -> None:
        self._read = read
        self.digest = manifest_digest(manifest)
        self._sizes = {item.name: item.size for item in manifest.artifacts}
        self._encoded = encode_manifest(manifest)

    @property
    def manifest_bytes(self) -> bytes:
        """Canonical bytes of the manifest."""
        return self._encoded

    def find(self, artifact: str) -> tuple[int, Callable[[int, int], bytes]] | None:
        """(size, read(offset, length)) of an artifact."""
        size = self._sizes.get(artifact)
        return None if size is None else (size, lambda offset, length: self._read(artifact, offset, length))

    async def manifest(self, digest: str) -> bytes:
        """As of `Source`."""
        if digest != self.digest:
            raise PeerError(f"{self.label} has manifest {self.digest[:12]}, not {digest[:12]}")
        return self._encoded

    async def fetch(self, digest: str, artifact: str, offset: int, length: int, sink: Sink) -> None:
        """As of `Source`. Errors: those of `read`."""
        if digest != self.digest:
            raise PeerError(f"{self.label} has manifest {self.digest[:12]}, not {digest[:12]}")
        for at in range(offset, offset + length, _READ_BYTES):
            count = min(_READ_BYTES, offset + length - at)
            await sink(await trio.to_thread.run_sync(self._read, artifact, at, count))


class Cache(Protocol):
    """The part of `ArtifactStore` that gives."""

    def manifest_bytes(self, digest: str) -> bytes | None:
        """Canonical bytes of a manifest, or None."""

    def find(self, digest: str, artifact: str) -> tuple[int, Callable[[int, int], bytes]] | None:
        """(size, read(offset, length)) of an artifact, or None."""


class Library:
    """Looks an artifact up in the model files, then in the cache."""

    def __init__(self, cache: Cache | None = None) -> None:
        self._cache = cache
        self._models: dict[str, ModelSource] = {}

    def add(self, model: ModelSource) -> None:
        """Give this model's bytes to whoever asks."""
        self._models[model.digest] = model

    def remove(self, digest: str) -> None:
        """Give them no longer (what the cache holds of it stays)."""
        self._models.pop(digest, None)

    def manifest_bytes(self, digest: str) -> bytes | None:
        """Canonical bytes, or None. Reads the disk."""
        model = self._models.get(digest)
        if model is not None:
            return model.manifest_bytes
        return self._cache.manifest_bytes(digest) if self._cache else None

    def find(self, digest: str, artifact: str) -> tuple[int, Callable[[int, int], bytes]] | None:
        """(size, read(offset, length)) of an artifact, or None. Reads the disk."""
        model = self._models.get(digest)
        found = model.find(artifact) if model else None
        return found or (self._cache.find(digest, artifact) if self._cache else None)
