"""GGUF key-values, kept in their encoded form.

A slice writes back what the file said, byte for byte, so a value keeps its encoding (`raw`) and is decoded only when
someone asks: a vocabulary of 150,000 strings costs a walk over its lengths, not 150,000 Python strings.
Source: ggml/docs/gguf.md, little endian only (big-endian files are refused when opened).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from meshnode.errors import ModelError

Scalar = int | float | bool | str


class ValueType(IntEnum):
    """Type codes of the GGUF format."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


FORMATS = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
WIDTHS = {kind: struct.calcsize("<" + code) for kind, code in FORMATS.items()}


@dataclass(frozen=True)
class KeyValue:
    """One key-value; `raw` is the encoded value behind its type code (arrays: item type, count, items)."""

    key: str
    type: ValueType
    raw: bytes

    @property
    def item_type(self) -> ValueType | None:
        """Type of the items of an array, None for a scalar."""
        return ValueType(struct.unpack_from("<I", self.raw)[0]) if self.type is ValueType.ARRAY else None

    @property
    def count(self) -> int | None:
        """Number of items of an array, None for a scalar."""
        return int(struct.unpack_from("<Q", self.raw, 4)[0]) if self.type is ValueType.ARRAY else None

    def scalar(self) -> Scalar:
        """Decode a scalar. Errors: ModelError when this is an array."""
        if self.type is ValueType.ARRAY:
            raise ModelError(f"the GGUF key {self.key!r} is an array where one value is needed")
        if self.type is ValueType.STRING:
            return self.raw[8:].decode("utf-8", "replace")
        value: Scalar = struct.unpack("<" + FORMATS[self.type], self.raw)[0]
        return value

    def items(self) -> list[Scalar]:
        """Decode an array. Errors: ModelError when this is a scalar."""
        kind, count = self.item_type, self.count
        if kind is None or count is None:
            raise ModelError(f"the GGUF key {self.key!r} is one value where an array is needed")
        if kind is not ValueType.STRING:
            return list(struct.unpack_from(f"<{count}{FORMATS[kind]}", self.raw, 12))
        strings: list[Scalar] = []
        at = 12
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", self.raw, at)
            strings.append(self.raw[at + 8 : at + 8 + length].decode("utf-8", "replace"))
            at += 8 + length
        return strings

    def encoded(self) -> bytes:
        """The bytes of this key-value in a GGUF header."""
        key = self.key.encode()
        return struct.pack("<Q", len(key)) + key + struct.pack("<I", self.type) + self.raw


def _encode_scalar(kind: ValueType, value: Scalar) -> bytes:
    if kind is ValueType.STRING:
        text = str(value).encode()
        return struct.pack("<Q", len(text)) + text
    return struct.pack("<" + FORMATS[kind], value)


def make_scalar(key: str, kind: ValueType, value: Scalar) -> KeyValue:
    """A key with one value of type `kind`."""
    return KeyValue(key, kind, _encode_scalar(kind, value))


def make_array(key: str, kind: ValueType, values: Sequence[Scalar]) -> KeyValue:
    """A key with an array of `kind`."""
    body = b"".join(_encode_scalar(kind, value) for value in values)
    return KeyValue(key, ValueType.ARRAY, struct.pack("<IQ", kind, len(values)) + body)
