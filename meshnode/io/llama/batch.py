"""The arrays behind a `llama_batch`, allocated once, and the call that runs them.

Every microsecond here is paid once a token and stage, with caches that the weights have just flushed: plain addresses
instead of typed pointers, and nothing allocated.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from meshnode.io.llama.native import api

# IMRoPE and M-RoPE rows have four positions (GGML_MROPE_SECTIONS).
MROPE_POSITIONS = 4


class _RawBatch(ctypes.Structure):
    """`struct llama_batch` with plain addresses."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


# Indexing a library makes a function of our own; the attribute is shared with llama_cpp and its argument types.
_decode = api._lib["llama_decode"]
_decode.argtypes, _decode.restype = [ctypes.c_void_p, _RawBatch], ctypes.c_int32
_logits = api._lib["llama_get_logits"]
_logits.argtypes, _logits.restype = [ctypes.c_void_p], ctypes.c_void_p


class Batch:
    """Room for `chunk` rows, with one position a row or, for embedding rows of M-RoPE models, four."""

    def __init__(self, chunk: int, mrope: bool, every_row_out: bool) -> None:
        self._mrope = mrope
        self._positions = np.zeros(chunk * (MROPE_POSITIONS if mrope else 1), np.int32)
        self._lanes = np.zeros(chunk, np.int32)
        self._outputs = np.ones(chunk, np.int8)
        self._flagged = not every_row_out
        self.tokens = np.zeros(chunk, np.int32)
        counts = np.ones(chunk, np.int32)
        pointers = self._lanes.ctypes.data + 4 * np.arange(chunk, dtype=np.uint64)
        self._kept = (counts, pointers)
        self._raw = _RawBatch(
            0,
            self.tokens.ctypes.data,
            None,
            self._positions.ctypes.data,
            counts.ctypes.data,
            pointers.ctypes.data,
            self._outputs.ctypes.data,
        )

    def fill(
        self, count: int, positions: NDArray[np.int32], lanes: NDArray[np.int32], flags: NDArray[np.bool_]
    ) -> None:
        """Set the rows; `flags` say which give logits where not every row is an output."""
        self._raw.n_tokens = count
        self._positions[:count] = positions
        if self._mrope:  # laid out by section: p p p 0
            self._positions[count : 2 * count] = positions
            self._positions[2 * count : 3 * count] = positions
            self._positions[3 * count : 4 * count] = 0
        self._lanes[:count] = lanes
        if self._flagged:
            self._outputs[:count] = flags

    def decode(self, context: int, rows: int) -> int:
        """Run the rows: `rows` is the address of embedding rows, or 0 to run `tokens`. llama.cpp's own result code."""
        raw = self._raw
        raw.embd = rows or None
        raw.token = None if rows else self.tokens.ctypes.data
        return int(_decode(context, raw))


class LogitsView:
    """The logits that llama.cpp keeps, as an array without copying; made anew only when the buffer moved."""

    def __init__(self, rows: int, vocabulary: int) -> None:
        self._shape = (rows, vocabulary)
        self._address = 0
        self._array = np.empty((0, vocabulary), np.float32)

    def rows(self, context: int, count: int) -> NDArray[np.float32]:
        """The first `count` rows; valid until the next decode."""
        address = _logits(context)
        if address != self._address:
            buffer = (ctypes.c_float * (self._shape[0] * self._shape[1])).from_address(address)
            self._array = np.ctypeslib.as_array(buffer).reshape(self._shape)
            self._address = address
        return self._array[:count]
