"""Build the manifest of a model file, and read its artifacts out of it.

Building hashes every byte once (about 1.5 GB/s a core with SHA extensions): it belongs in a thread of its own, reports
its progress, and stops when the callback says so.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from types import TracebackType

from meshnode.errors import ModelError
from meshnode.io.llama.gguf_file import GgufModel, Tensor, encode_header, open_model
from meshnode.io.llama.slicing import TOKEN_EMBEDDING
from meshnode.wire.manifest import (
    EMBEDDING,
    LAYERS_MAX,
    METADATA,
    OUTPUT,
    SHARED,
    Artifact,
    Manifest,
    TensorEntry,
    artifact_names,
    layer_name,
)

_LAYER = re.compile(r"^blk\.(\d+)\.")
# One read while hashing: large enough for the disk, small enough to cancel within a few milliseconds.
_READ_BYTES = 4 << 20


class Cancelled(Exception):
    """The progress callback asked to stop."""


def layer_count(model: GgufModel) -> int:
    """Layers that run: `block_count` less the prediction blocks. Errors: ModelError."""
    architecture = architecture_of(model)
    blocks = model.scalar(f"{architecture}.block_count")
    extra = model.scalar(f"{architecture}.nextn_predict_layers") or 0
    if not isinstance(blocks, int) or not isinstance(extra, int) or not 0 < blocks - extra <= LAYERS_MAX or extra < 0:
        raise ModelError(f"the model says that it has {blocks} layers of which {extra} only predict")
    return blocks - extra


def architecture_of(model: GgufModel) -> str:
    """The value of `general.architecture`. Errors: ModelError where it is missing."""
    name = model.scalar("general.architecture")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9._-]{1,64}", name):
        raise ModelError("the GGUF does not say its architecture", "Is it a language model and not an adapter?")
    return name


def metadata_bytes(model: GgufModel) -> bytes:
    """The metadata artifact: all key-values, no tensors; also what a tokenizer loads."""
    return encode_header([item for item in model.keys if not item.key.startswith("split.")], [])


def artifact_of(name: str, layers: int) -> str | None:
    """The artifact that the tensor `name` belongs to; None for the extra prediction blocks."""
    match = _LAYER.match(name)
    if match:
        index = int(match[1])
        return layer_name(index) if index < layers else None
    if name == TOKEN_EMBEDDING:
        return EMBEDDING
    return OUTPUT if name.startswith("output") else SHARED


def group_tensors(model: GgufModel) -> dict[str, list[Tensor]]:
    """Tensors by artifact, in the order of the manifest; within an artifact in the order of the files."""
    layers = layer_count(model)
    groups: dict[str, list[Tensor]] = {name: [] for name in artifact_names(layers)[1:]}
    for tensor in sorted(model.tensors, key=lambda item: item.name):
        artifact = artifact_of(tensor.name, layers)
        if artifact is not None:
            groups[artifact].append(tensor)
    return {name: tensors for name, tensors in groups.items() if tensors}


def build_manifest(model: GgufModel, progress: Callable[[int, int], bool] | None = None) -> Manifest:
    """Hash the whole model into its manifest.

    `progress(done, total)` in bytes returns False to stop. Errors: ModelError, Cancelled, OSError.
    """
    groups = group_tensors(model)
    metadata = metadata_bytes(model)
    artifacts = [Artifact(METADATA, len(metadata), hashlib.sha256(metadata).digest())]
    total = sum(tensor.size for tensors in groups.values() for tensor in tensors)
    done = 0
    files = [_SharedFile(path) for path in model.files]
    try:
        for name, tensors in groups.items():
            digest, entries, end = hashlib.sha256(), [], 0
            for tensor in tensors:
                entries.append(TensorEntry(tensor.name, tensor.type, tensor.dims, end, tensor.size))
                end += tensor.size
                for at in range(0, tensor.size, _READ_BYTES):
                    data = files[tensor.file].read(tensor.offset + at, min(_READ_BYTES, tensor.size - at))
                    digest.update(data)
                    done += len(data)
                    if progress is not None and not progress(done, total):
                        raise Cancelled
            artifacts.append(Artifact(name, end, digest.digest(), tuple(entries)))
    finally:
        for file in files:
            file.close()
    return Manifest(1, architecture_of(model), layer_count(model), tuple(artifacts))


def described(metadata: Path, manifest: Manifest) -> GgufModel:
    """The model of `manifest` without its weights, from its metadata artifact alone. Errors: ModelError."""
    entries = (entry for artifact in manifest.artifacts for entry in artifact.tensors)
    tensors = tuple(Tensor(entry.name, entry.type, entry.dims, 0, entry.offset, entry.size) for entry in entries)
    return GgufModel((metadata,), open_model(metadata).keys, tensors)


class _SharedFile:
    """Reads at offsets, from several threads. Not a mapping: a file that becomes shorter would end the process."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._lock = Lock()

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Errors: ModelError where the file ends before."""
        parts: list[bytes] = []
        while length:
            with self._lock:
                if self._file.closed:
                    raise ModelError("the model was unloaded while it was read")
                self._file.seek(offset)
                data = self._file.read(length)
            if not data:
                raise ModelError(
                    "the model file became shorter while it was read", "Do not change it while it is served."
                )
            parts.append(data)
            offset, length = offset + len(data), length - len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Close the file; who reads at this moment is waited for."""
        with self._lock:
            self._file.close()


class ModelArtifacts:
    """Byte ranges of artifacts, read from the model's own files. Safe to use from several threads."""

    def __init__(self, model: GgufModel, manifest: Manifest) -> None:
        self._metadata = metadata_bytes(model)
        self._entries = {item.name: item.tensors for item in manifest.artifacts}
        self._places = model.by_name
        self._files = [_SharedFile(path) for path in model.files]

    def read(self, artifact: str, offset: int, length: int) -> bytes:
        """`length` bytes of `artifact` from `offset`. Errors: ModelError for a range it does not have."""
        if artifact == METADATA:
            data = self._metadata[offset : offset + length]
        else:
            data = b"".join(self._pieces(artifact, offset, length))
        if len(data) != length or offset < 0:
            raise ModelError(f"the artifact {artifact} has no {length} bytes at {offset}")
        return data

    def _pieces(self, artifact: str, offset: int, length: int) -> list[bytes]:
        pieces = []
        for entry in self._entries.get(artifact, ()):
            start, end = max(offset, entry.offset), min(offset + length, entry.offset + entry.size)
            if start < end:
                place = self._places[entry.name]
                pieces.append(self._files[place.file].read(place.offset + start - entry.offset, end - start))
        return pieces

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> ModelArtifacts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_artifacts(model: GgufModel, manifest: Manifest) -> ModelArtifacts:
    """Reader of the artifacts of a model that this node holds; its `read` feeds `write_slice` and the bulk transfer."""
    return ModelArtifacts(model, manifest)
