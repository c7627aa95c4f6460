"""Lay out a slice of layers [first, last) as a GGUF of its own.

A slice is an ordinary small model for llama.cpp: layers renumbered from 0, every slice but the last without a
vocabulary. The layout says which byte ranges of which artifacts go where, so that a joiner writes its slice without
ever holding the model. What no extent covers is a hole of zeros.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshnode.errors import ModelError
from meshnode.io.llama.gguf_file import alignment_of, encode_header, tensor_bytes
from meshnode.io.llama.gguf_values import KeyValue
from meshnode.io.llama.slice_keys import EMPTY_VOCABULARY, slice_keys, slice_order
from meshnode.io.llama.traits import Keys, traits_of
from meshnode.wire.manifest import EMBEDDING, LAYER_PREFIX, OUTPUT, SHARED, Manifest, TensorEntry, layer_name

TOKEN_EMBEDDING = "token_embd.weight"  # noqa: S105 (a tensor)
OUTPUT_WEIGHT = "output.weight"
OUTPUT_BIAS = "output.bias"
_F32 = 0
# The smallest types of which bytes of zero are numbers of zero, with the values of a block: 1.1, 4.5 and 16 bits a
# value.
_SMALL_TYPES = ((41, 128), (2, 32), (1, 1))  # Q1_0, Q4_0, F16
# One read and write of a slice file; larger gains nothing, smaller costs calls.
_COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class Extent:
    """`length` bytes at `artifact_offset` of `artifact` belong at `file_offset` of the slice file."""

    artifact: str
    artifact_offset: int
    length: int
    file_offset: int


@dataclass(frozen=True)
class SliceLayout:
    """A slice file: its header, what to copy, and its size in bytes (the rest is zeros)."""

    header: bytes
    extents: tuple[Extent, ...]
    size: int

    @property
    def bytes_copied(self) -> int:
        """Bytes that come from artifacts: the disk the slice takes."""
        return sum(item.length for item in self.extents)


@dataclass(frozen=True)
class _Placed:
    """A tensor of the slice; without `artifact` it is zeros."""

    name: str
    type: int
    dims: tuple[int, ...]
    size: int
    artifact: str = ""
    artifact_offset: int = 0


def layout_slice(keys: Sequence[KeyValue], manifest: Manifest, first: int, last: int) -> SliceLayout:
    """Layout of layers [first, last). `keys` are those of the metadata artifact.

    Errors: ModelError when this slice cannot be cut.
    """
    if not 0 <= first < last <= manifest.layers:
        raise ModelError(f"layers {first} to {last} are not a slice of a model of {manifest.layers} layers")
    _check(keys, manifest)
    final = last == manifest.layers
    traits = traits_of(keys, manifest.layers)
    if traits.whole and not (first == 0 and final):
        raise ModelError(f"this model cannot be split: {traits.whole}", "Serve it whole, on one node.")
    order = slice_order(traits, first, last)
    sliced = slice_keys(keys, traits, order)
    placed = [*_vocabulary_tensors(manifest, first == 0, final), *_copied(manifest, SHARED)]
    if first:
        placed = [_emptied(item) if item.name in traits.row.zeroed else item for item in placed]
    for position, use in enumerate(order):
        own = _copied(manifest, layer_name(use.source), (f"blk.{use.source}.", f"blk.{position}."))
        placed += [_emptied(item) for item in own] if use.passing else own
    return _laid_out(sliced, placed)


def _check(keys: Sequence[KeyValue], manifest: Manifest) -> None:
    """Refuse a manifest that contradicts itself or its metadata: both may come from a peer."""
    read = Keys(keys)
    layers = read.number("block_count") - read.number("nextn_predict_layers")
    if read.architecture != manifest.architecture or layers != manifest.layers:
        raise ModelError("the manifest and the metadata are not of the same model")
    for artifact in manifest.artifacts:
        for entry in artifact.tensors:
            if tensor_bytes(entry.type, entry.dims) != entry.size:
                raise ModelError(f"the manifest gives the tensor {entry.name!r} a size that its shape does not have")
            own = f"blk.{artifact.name.removeprefix(LAYER_PREFIX)}."
            if entry.name.startswith("blk.") != entry.name.startswith(own):
                raise ModelError(f"the manifest has the tensor {entry.name!r} in {artifact.name}")


def layout_embedding(keys: Sequence[KeyValue], manifest: Manifest) -> SliceLayout:
    """Layout of the file that the first stage looks tokens up in: a GGUF of the token embedding alone."""
    return _laid_out([item for item in keys if item.key == "general.architecture"], _copied(manifest, EMBEDDING))


def _copied(manifest: Manifest, artifact: str, renamed: tuple[str, str] = ("", "")) -> list[_Placed]:
    item = manifest.artifact(artifact)
    if item is None:
        return []
    old, new = renamed
    return [_Placed(new + t.name.removeprefix(old), t.type, t.dims, t.size, artifact, t.offset) for t in item.tensors]


def _emptied(item: _Placed) -> _Placed:
    """A tensor of zeros in the place of `item`."""
    return _Placed(item.name, item.type, item.dims, item.size)


def _zeros(entry: TensorEntry, rows: int | None = None) -> _Placed:
    """A tensor of zeros in the place of `entry`; with `rows`, of that many rows of 32-bit floats."""
    if rows is None:
        return _Placed(entry.name, entry.type, entry.dims, entry.size)
    dims = (*entry.dims[:-1], rows)
    return _Placed(entry.name, _F32, dims, tensor_bytes(_F32, dims))


def _unread(entry: TensorEntry) -> _Placed:
    """A table in the place of `entry` that nothing reads, though llama.cpp insists on its shape and loads it.

    A hole in the file, of a type that takes little memory (150,000 rows of 4,096 at 16 bits would be 1.2 GB).
    """
    kind = next(kind for kind, block in _SMALL_TYPES if entry.dims[0] % block == 0)
    return _Placed(entry.name, kind, entry.dims, tensor_bytes(kind, entry.dims))


def _vocabulary_tensors(manifest: Manifest, initial: bool, final: bool) -> list[_Placed]:
    embedding, output = manifest.artifact(EMBEDDING), manifest.artifact(OUTPUT)
    entries = [] if output is None else list(output.tensors)
    tied = not any(item.name == OUTPUT_WEIGHT for item in entries)
    if embedding is None:
        raise ModelError("the model has no token embedding")
    if final:
        held = tied or initial
        table = _copied(manifest, EMBEDDING) if held else [_unread(item) for item in embedding.tensors]
        return [*table, *_copied(manifest, OUTPUT)]
    resized = (OUTPUT_WEIGHT, OUTPUT_BIAS)
    placed = [_zeros(item, EMPTY_VOCABULARY) for item in embedding.tensors]
    return placed + [_zeros(item, EMPTY_VOCABULARY if item.name in resized else None) for item in entries]


def _laid_out(keys: Sequence[KeyValue], placed: Sequence[_Placed]) -> SliceLayout:
    alignment = alignment_of(keys)
    offsets: list[int] = []
    end = 0
    for item in placed:
        offsets.append(end)
        end += -(-item.size // alignment) * alignment
    described = [(item.name, item.type, item.dims, offset) for item, offset in zip(placed, offsets, strict=True)]
    header = encode_header(keys, described)
    extents = [
        Extent(item.artifact, item.artifact_offset, item.size, len(header) + offset)
        for item, offset in zip(placed, offsets, strict=True)
        if item.artifact
    ]
    return SliceLayout(header, tuple(_merged(extents)), len(header) + end)


def _merged(extents: Iterable[Extent]) -> list[Extent]:
    merged: list[Extent] = []
    for item in extents:
        before = merged[-1] if merged else None
        if (
            before is not None
            and before.artifact == item.artifact
            and before.artifact_offset + before.length == item.artifact_offset
            and before.file_offset + before.length == item.file_offset
        ):
            merged[-1] = Extent(item.artifact, before.artifact_offset, before.length + item.length, before.file_offset)
        else:
            merged.append(item)
    return merged


def write_slice(layout: SliceLayout, read: Callable[[str, int, int], bytes], path: Path) -> None:
    """Write the slice to `path`, whole or not at all. `read(artifact, offset, length)` gives exactly `length` bytes.

    Errors: ModelError when `read` gives fewer bytes; OSError of the disk.
    """
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            file.write(layout.header)
            for extent in layout.extents:
                file.seek(extent.file_offset)
                for at in range(0, extent.length, _COPY_BYTES):
                    length = min(_COPY_BYTES, extent.length - at)
                    data = read(extent.artifact, extent.artifact_offset + at, length)
                    if len(data) != length:
                        raise ModelError(f"the artifact {extent.artifact} is shorter than its manifest says")
                    file.write(data)
            file.truncate(layout.size)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
