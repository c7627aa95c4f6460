"""Rows of numbers as bytes: f16 with a power-of-two scale per row, f32, and blocks of 8-bit values.

A row is first divided by 2^exponent: exact in binary, keeps the outliers of large models (beyond f16's 65504) and the
full 11 bits of rows that are small everywhere. The exponent travels in the row table (one signed byte); it is the
sender's choice: 0 where f16 holds the row well as it is, else what brings its largest value into [2^14, 2^15).
Source of the block format: ggml's q8_0, 34 bytes for 32 values.

A decode step sends one row, and what it costs is not arithmetic but the number of calls: after llama_decode has
streamed a slice through the caches, each numpy call takes up to 10 us. So ordinary rows are proved to be ordinary by
one dot product, the cheapest look at all values; and np.errstate (20 us) is left to who calls: a row that is not
ordinary may also draw a RuntimeWarning from numpy, and who turns warnings into errors sets it for the whole thread.

Invariant: what `unpack` returns is finite; `pack` refuses what is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from meshnode.errors import PeerError, StageError

Floats = NDArray[np.float32]


class Dtype(IntEnum):
    """How the payload of a ROWS frame is written; numbers are wire values."""

    NONE = 0
    TOKENS = 1
    """int32 token ids, width 1: only from the head to stage 0."""
    F16 = 2
    F32 = 3
    Q8 = 4


WIRE_DTYPES: Final = {"f16": Dtype.F16, "f32": Dtype.F32, "q8": Dtype.Q8}
"""The names a user and a plan know."""

_BLOCK: Final = 32
_Q8: Final = np.dtype([("scale", "<f2"), ("values", "i1", (_BLOCK,))])
_F16: Final = np.dtype("<f2")
_F32: Final = np.dtype("<f4")
_LARGEST_EXPONENT: Final = 15
"""A scaled row reaches at most 2^15, half of what f16 holds: rounding up can never overflow."""
_BLOCKS: Final = {
    Dtype.NONE: (1, 0),
    Dtype.TOKENS: (1, 4),
    Dtype.F16: (1, 2),
    Dtype.F32: (1, 4),
    Dtype.Q8: (_BLOCK, _Q8.itemsize),
}
"""How many values go into one block, and its bytes."""


def payload_bytes(dtype: Dtype, rows: int, width: int) -> int:
    """Bytes that `rows` rows of `width` values take."""
    block, size = _BLOCKS[dtype]
    return rows * -(-width // block) * size


def pack(values: Floats, dtype: Dtype) -> tuple[NDArray[Any], Sequence[int]]:
    """`values` (rows, width) as a contiguous array of wire bytes, and the exponent of each row.

    Raises StageError("non_finite") when a row holds an infinity or not-a-number.
    """
    if len(values) == 1 and dtype is not Dtype.Q8 and _ordinary(values[0], dtype):
        return np.ascontiguousarray(values, _F16 if dtype is Dtype.F16 else _F32), (0,)
    largest = np.maximum(values.max(axis=1), -values.min(axis=1))
    # max and min hand a not-a-number on, so one look at (rows,) values is enough.
    if not np.isfinite(largest).all():
        raise StageError("non_finite", "a row of activations holds values that are not finite")
    if dtype is Dtype.F32:
        return np.ascontiguousarray(values, _F32), (0,) * len(values)
    exponents = np.clip(np.frexp(largest)[1] - _LARGEST_EXPONENT, -126, 127)
    exponents[largest == 0] = 0
    scaled = values * np.ldexp(np.float32(1), -exponents)[:, None]
    if dtype is Dtype.F16:
        return scaled.astype(_F16), exponents.tolist()
    assert dtype is Dtype.Q8
    return _pack_q8(scaled), exponents.tolist()


def _ordinary(row: Floats, dtype: Dtype) -> bool:
    """Whether a row is surely finite, and f16 holds it well without an exponent. False: look closer.

    One dot product bounds its largest value from both sides: sqrt(squares / width) <= largest <= sqrt(squares).
    """
    squares = float(row.dot(row))
    if dtype is Dtype.F32:
        return math.isfinite(squares)
    # Largest below 2^15, so nothing overflows; and at least 2^-4, so that f16's smallest step (2^-24) is below 2^-20
    # of it, far finer than the 2^-11 to which the large values are rounded.
    return 2.0**-8 * len(row) <= squares <= 2.0**30


def _pack_q8(scaled: Floats) -> NDArray[Any]:
    rows, width = scaled.shape
    if width % _BLOCK:
        scaled = np.pad(scaled, ((0, 0), (0, _BLOCK - width % _BLOCK)))
    grouped = scaled.reshape(rows, -1, _BLOCK)
    blocks = np.empty(grouped.shape[:2], _Q8)
    blocks["scale"] = np.abs(grouped).max(axis=2) / 127
    # Divide by the scale as it will be read (rounded to f16): that halves the worst error.
    scale = blocks["scale"].astype(np.float32)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    blocks["values"] = np.clip(np.rint(grouped * inverse[:, :, None]), -127, 127)
    return blocks


def unpack(payload: memoryview, dtype: Dtype, width: int, exponents: Sequence[int]) -> Floats:
    """Rows (len(exponents), width) from wire bytes; f32 without a copy (then read-only).

    `payload` has exactly `payload_bytes` bytes. Raises PeerError when a value is not finite.
    """
    rows = len(exponents)
    if dtype is Dtype.F16:
        flat = np.frombuffer(payload, _F16).astype(np.float32)
    elif dtype is Dtype.F32:
        flat = np.frombuffer(payload, _F32)
    else:
        flat = _unpack_q8(payload, width, rows)
    values = flat.reshape(rows, width)
    if any(exponents) and dtype is not Dtype.F32:
        values *= np.ldexp(np.float32(1), np.array(exponents))[:, None]
    # Finite as a whole: then so is each. Squares beyond float32 are looked at closer.
    if not math.isfinite(float(flat.dot(flat))) and not np.isfinite(values).all():
        raise PeerError("an activation frame holds values that are not finite")
    return values


def _unpack_q8(payload: memoryview, width: int, rows: int) -> Floats:
    blocks = np.frombuffer(payload, _Q8).reshape(rows, -1)
    values = blocks["values"] * blocks["scale"].astype(np.float32)[:, :, None]
    return np.ascontiguousarray(values.reshape(rows, -1)[:, :width]).reshape(-1)
