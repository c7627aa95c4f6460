"""Token embedding: a row look-up outside llama.cpp, so that only the first stage's node holds the table.

Rows are converted by ggml's own `to_float`, the function that llama.cpp's row look-up calls: the same bits.
The table is mapped, so that only the rows that are asked for are ever read.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from meshnode.errors import ModelError, StageError
from meshnode.io.llama import native
from meshnode.io.llama.batch import RowBuffer
from meshnode.io.llama.gguf_file import open_model, tensor_bytes
from meshnode.io.llama.slicing import TOKEN_EMBEDDING

_F32 = 0


class EmbeddingTable:
    """Rows of `token_embd.weight` of a GGUF file as float32."""

    def __init__(self, path: Path) -> None:
        model = open_model(path)
        tensor = model.by_name.get(TOKEN_EMBEDDING)
        if tensor is None or len(tensor.dims) != 2:
            raise ModelError(f"{path.name} has no token embedding")
        self.width, self.rows = tensor.dims
        self._row_bytes = tensor_bytes(tensor.type, (self.width,))
        with model.files[tensor.file].open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        table = np.frombuffer(self._map, np.uint8, tensor.size, tensor.offset)
        self._table = table.reshape(self.rows, self._row_bytes)
        self._address = self._table.ctypes.data
        self._floats = self._table.view(np.float32) if tensor.type == _F32 else None
        self._to_float = None if tensor.type == _F32 else native.type_traits(tensor.type).contents.to_float
        if tensor.type != _F32 and not self._to_float:
            raise ModelError(f"rows of tensor type {tensor.type} cannot be converted to numbers")

    def look_up(self, tokens: Sequence[int], into: RowBuffer) -> None:
        """Write the embedding of token i to row i of `into`.

        Errors: StageError with reason bad_rows for a token outside the vocabulary.
        """
        if min(tokens) < 0 or max(tokens) >= self.rows:
            raise StageError("bad_rows", f"a token id outside the vocabulary of {self.rows}")
        if self._floats is not None:
            into.array[: len(tokens)] = self._floats[list(tokens)]
            return
        assert self._to_float is not None
        target = into.address
        for token in tokens:
            self._to_float(self._address + token * self._row_bytes, target, self.width)
            target += into.row_bytes

    def close(self) -> None:
        """Unmap the table."""
        del self._table, self._floats
        self._map.close()
