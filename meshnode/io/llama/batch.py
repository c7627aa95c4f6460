"""The arrays behind a `llama_batch`, allocated once, and the call that runs them.

Every microsecond here is paid once a token and stage, with caches that the weights have just flushed: plain addresses
instead of typed pointers, and nothing allocated.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

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


class RowBuffer:
    """(rows, width) float32 that never moves: asking numpy for an address costs 15 us with cold caches."""

    def __init__(self, rows: int, width: int) -> None:
        self.array = np.zeros((rows, width), np.float32)
        self.address = int(self.array.ctypes.data)
        self.row_bytes = width * 4


class Batch:
    """Room for `chunk` rows, with one position a row or, for embedding rows of M-RoPE models, four.

    What runs are the embedding rows at address `source`, or `tokens` where that is 0.
    """

    def __init__(self, chunk: int, mrope: bool, every_row_out: bool, source: int) -> None:
        self._mrope = mrope
        self._flagged = not every_row_out
        arrays = [np.zeros(size, np.int32) for size in (chunk, chunk * (MROPE_POSITIONS if mrope else 1), chunk)]
        outputs, counts = np.ones(chunk, np.int8), np.ones(chunk, np.int32)
        pointers = arrays[2].ctypes.data + 4 * np.arange(chunk, dtype=np.uint64)
        self._kept = (counts, pointers)
        # Single numbers are set through views of memory: half the cost of numpy's own way.
        self.tokens, self._positions, self._lanes = (array.data for array in arrays)
        self._outputs = outputs.data
        self._raw = _RawBatch(
            0,
            None if source else arrays[0].ctypes.data,
            source or None,
            arrays[1].ctypes.data,
            counts.ctypes.data,
            pointers.ctypes.data,
            outputs.ctypes.data,
        )

    def fill(self, positions: Sequence[int], lanes: Sequence[int], flags: Sequence[bool]) -> None:
        """Set the rows; `flags` say which give logits where not every row is an output."""
        count = len(positions)
        self._raw.n_tokens = count
        for row in range(count):
            self._positions[row] = positions[row]
            self._lanes[row] = lanes[row]
            if self._flagged:
                self._outputs[row] = flags[row]
        if self._mrope:  # laid out by section: p p p 0
            for section in (1, 2):
                self._positions[section * count : (section + 1) * count] = self._positions[:count]
            for row in range(3 * count, 4 * count):
                self._positions[row] = 0

    def decode(self, context: int) -> int:
        """Run the rows. llama.cpp's own result code."""
        return int(_decode(context, self._raw))


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
