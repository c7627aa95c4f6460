"""Read a GGUF model (one file or all its shards) into a frozen description, and encode GGUF headers.

The bytes are hostile: every count, length and offset is checked against what the file can hold before anything is
allocated, and every defect is one `ModelError` that names the file. Our own parser, because gguf.GGUFReader trusts
counts and builds arrays for every string (3.5 s on a vocabulary of 150,000, here 0.01 s).
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES

from meshnode.errors import ModelError
from meshnode.io.llama.gguf_values import WIDTHS, KeyValue, Scalar, ValueType

MAGIC = b"GGUF"
# Largest counts a real file comes near to: 1,000 keys, 60,000 tensors (unfused experts); beyond, the header is corrupt.
KEYS_MAX = 65_536
TENSORS_MAX = 262_144
KEY_BYTES_MAX = 65_535
# GGML_MAX_NAME and GGML_MAX_DIMS of ggml.h.
NAME_BYTES_MAX = 64
DIMS_MAX = 4
# LLAMA_MAX_LAYERS is 512; more shards than layers do not exist.
SHARDS_MAX = 1_024
ALIGNMENT_DEFAULT = 32
_SHARD_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_TYPE_SIZES = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}


@dataclass(frozen=True)
class Tensor:
    """One tensor: `dims` as in the file (innermost first), `offset` and `size` in bytes within file number `file`."""

    name: str
    type: int
    dims: tuple[int, ...]
    file: int
    offset: int
    size: int


@dataclass(frozen=True)
class GgufModel:
    """A model as its files describe it; `keys` are those of the first shard."""

    files: tuple[Path, ...]
    keys: tuple[KeyValue, ...]
    tensors: tuple[Tensor, ...]

    @cached_property
    def by_key(self) -> Mapping[str, KeyValue]:
        """Key-values by key."""
        return {item.key: item for item in self.keys}

    @cached_property
    def by_name(self) -> Mapping[str, Tensor]:
        """Tensors by name."""
        return {item.name: item for item in self.tensors}

    @property
    def bytes_total(self) -> int:
        """Bytes of all tensors."""
        return sum(item.size for item in self.tensors)

    def scalar(self, key: str) -> Scalar | None:
        """The value of `key`, None where absent. Errors: ModelError for an array."""
        item = self.by_key.get(key)
        return None if item is None else item.scalar()


def tensor_bytes(kind: int, dims: Sequence[int]) -> int:
    """Bytes of a tensor of ggml type `kind`.

    Errors: ModelError for unknown types and rows that are not whole blocks.
    """
    if kind not in _TYPE_SIZES:
        raise ModelError(
            f"tensor type {kind} is unknown to this version", "Convert the model to a common quantization."
        )
    block, width = _TYPE_SIZES[kind]
    if not dims or dims[0] % block:
        raise ModelError(f"a tensor row of {dims[0] if dims else 0} values is not a multiple of its block of {block}")
    count = 1
    for dim in dims:
        count *= dim
    return count // block * width


class _Cursor:
    """Bounded reads from a mapped file; every overrun is a ModelError."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data, self.name, self.at, self.end = data, name, 0, len(data)

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.name} is not a usable GGUF file: {what}", "Download or convert the file again.")

    def skip(self, count: int) -> int:
        """Move on by `count` bytes and return where they begin."""
        start = self.at
        if count < 0 or count > self.end - start:
            raise self.fail(f"it ends in the middle of its header (byte {start})")
        self.at = start + count
        return start

    def number(self, code: str) -> int:
        size = struct.calcsize(code)
        return int(struct.unpack_from(code, self.data, self.skip(size))[0])

    def text(self, longest: int, what: str) -> str:
        length = self.number("<Q")
        if length > longest:
            raise self.fail(f"{what} of {length} bytes")
        start = self.skip(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} that is not UTF-8") from None

    def value(self, kind: int) -> tuple[ValueType, bytes]:
        start = self.at
        if kind == ValueType.STRING:
            self.skip(self.number("<Q"))
        elif kind == ValueType.ARRAY:
            self._array()
        elif kind in WIDTHS:
            self.skip(WIDTHS[ValueType(kind)])
        else:
            raise self.fail(f"value type {kind} does not exist")
        return ValueType(kind), self.data[start : self.at]

    def _array(self) -> None:
        item, count = self.number("<I"), self.number("<Q")
        if item in WIDTHS:
            self.skip(count * WIDTHS[ValueType(item)])
            return
        if item != ValueType.STRING:
            raise self.fail(f"arrays of type {item} are not allowed")
        if count > (self.end - self.at) // 8:
            raise self.fail(f"an array of {count} strings does not fit in the file")
        unpack, data, at, end = struct.Struct("<Q").unpack_from, self.data, self.at, self.end
        for _ in range(count):
            if at + 8 > end:
                raise self.fail("it ends inside an array of strings")
            at += 8 + unpack(data, at)[0]
        if at > end:
            raise self.fail("it ends inside an array of strings")
        self.at = at


def _read_header(cursor: _Cursor, file: int) -> tuple[list[KeyValue], list[Tensor]]:
    if cursor.end < 24 or cursor.data[:4] != MAGIC:
        raise cursor.fail("it does not begin with the letters GGUF")
    cursor.skip(4)
    version = cursor.number("<I")
    if version not in (2, 3):
        raise cursor.fail(f"version {version:#x} (big-endian files and version 1 are not supported)")
    tensor_count, key_count = cursor.number("<Q"), cursor.number("<Q")
    if tensor_count > TENSORS_MAX or key_count > KEYS_MAX:
        raise cursor.fail(f"{tensor_count} tensors and {key_count} keys are more than any model has")
    keys: dict[str, KeyValue] = {}
    for _ in range(key_count):
        key = cursor.text(KEY_BYTES_MAX, "a key")
        kind, raw = cursor.value(cursor.number("<I"))
        if key in keys:
            raise cursor.fail(f"the key {key!r} appears twice")
        keys[key] = KeyValue(key, kind, raw)
    tensors = [_read_tensor(cursor, file) for _ in range(tensor_count)]
    alignment = _alignment(keys.values())
    data_start = -(-cursor.at // alignment) * alignment
    return list(keys.values()), [_placed(cursor, tensor, data_start, alignment) for tensor in tensors]


def _alignment(keys: Iterable[KeyValue]) -> int:
    for item in keys:
        if item.key == "general.alignment":
            value = item.scalar() if item.type is ValueType.UINT32 else 0
            if not isinstance(value, int) or value <= 0 or value % 8 or value & (value - 1) or value > 65_536:
                raise ModelError("general.alignment of the GGUF is not a power of two between 8 and 65536")
            return value
    return ALIGNMENT_DEFAULT


def _read_tensor(cursor: _Cursor, file: int) -> Tensor:
    name = cursor.text(NAME_BYTES_MAX, "a tensor name")
    rank = cursor.number("<I")
    if not 1 <= rank <= DIMS_MAX:
        raise cursor.fail(f"the tensor {name!r} has {rank} dimensions")
    dims = tuple(cursor.number("<Q") for _ in range(rank))
    if any(dim < 1 or dim > 1 << 48 for dim in dims):
        raise cursor.fail(f"the tensor {name!r} has the shape {dims}")
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    try:
        size = tensor_bytes(kind, dims)
    except ModelError as error:
        raise ModelError(f"{cursor.name}: tensor {name!r}: {error}", error.hint) from None
    return Tensor(name, kind, dims, file, offset, size)


def _placed(cursor: _Cursor, tensor: Tensor, data_start: int, alignment: int) -> Tensor:
    if tensor.offset % alignment or tensor.offset + tensor.size > cursor.end - data_start:
        raise cursor.fail(f"the tensor {tensor.name!r} lies outside the file (is it cut short?)")
    offset = data_start + tensor.offset
    return Tensor(tensor.name, tensor.type, tensor.dims, tensor.file, offset, tensor.size)


def _read_file(path: Path, file: int) -> tuple[list[KeyValue], list[Tensor]]:
    try:
        with path.open("rb") as handle:
            if path.stat().st_size == 0:
                raise ModelError(f"{path.name} is empty", "Download or convert the file again.")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                keys, tensors = _read_header(_Cursor(data, path.name), file)
    except OSError as error:
        raise ModelError(f"cannot read the model {path}: {error.strerror or error}", "Check the path.") from None
    ordered = sorted(tensors, key=lambda item: item.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.size > after.offset:
            raise ModelError(f"{path.name}: the tensors {before.name!r} and {after.name!r} overlap")
    return keys, tensors


def shard_paths(path: Path, count: int) -> list[Path]:
    """All shards of a model of which `path` is the first. Errors: ModelError naming the one that is missing."""
    if count == 1:
        return [path]
    match = _SHARD_NAME.match(path.name)
    if match is None or not 1 < count <= SHARDS_MAX or int(match["count"]) != count:
        raise ModelError(
            f"{path.name} says that it is one of {count} files",
            "Keep the names NAME-00001-of-0000N.gguf and give the first one.",
        )
    if int(match["number"]) != 1:
        raise ModelError(f"{path.name} is not the first file of the model", "Give the file -00001-of-.")
    paths = [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    for shard in paths:
        if not shard.is_file():
            raise ModelError(f"the model lacks its file {shard.name}", f"Put it beside {path.name}.")
    return paths


def open_model(path: Path) -> GgufModel:
    """Read the header of `path` and of its further shards.

    Errors: ModelError (with a hint) for anything missing, cut short or inconsistent.
    """
    keys, tensors = _read_file(path, 0)
    by_key = {item.key: item for item in keys}
    count, number = (by_key.get(key) for key in ("split.count", "split.no"))
    shards = 1 if count is None else count.scalar()
    if not isinstance(shards, int) or (number is not None and number.scalar() != 0):
        raise ModelError(f"{path.name} is not the first file of the model", "Give the file -00001-of-.")
    paths = shard_paths(path, max(shards, 1))
    for index, shard in enumerate(paths[1:], start=1):
        tensors += _read_file(shard, index)[1]
    names = [item.name for item in tensors]
    if len(set(names)) != len(names):
        raise ModelError(f"{path.name}: a tensor name appears twice")
    return GgufModel(tuple(paths), tuple(keys), tuple(tensors))


def encode_header(keys: Sequence[KeyValue], tensors: Sequence[tuple[str, int, tuple[int, ...], int]]) -> bytes:
    """A GGUF header padded to its data section.

    `tensors` are (name, ggml type, dims, offset from the data section).
    """
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(keys)), *(item.encoded() for item in keys)]
    for name, kind, dims, offset in tensors:
        encoded = name.encode()
        shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        parts += [struct.pack("<Q", len(encoded)), encoded, shape, struct.pack("<IQ", kind, offset)]
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment_of(keys))


def alignment_of(keys: Iterable[KeyValue]) -> int:
    """Bytes that tensor data is aligned to. Errors: ModelError for a value that is none."""
    return _alignment(keys)
