"""The tap: take activations out of a running graph, and put them in, through llama.cpp's evaluation callback.

The callback is entered for every node of the graph, so all it does is count. Where the wanted tensors lie is learned by
name once for each shape of batch; from then on the count says it and the name is only checked there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meshnode.io.llama import native

# Shapes of batch to remember; a stage sees a few (decode of 1 to lanes rows, prefill chunks of any length).
_SHAPES_MAX = 1_024


@dataclass
class Tap:
    """Copies the tensor `out` into `buffer`, and `incoming` into the tensor `into`, of every graph that runs.

    `buffer` is (chunk, width) float32. An empty `out` lets the graph run to its end, an empty `into` feeds nothing.
    """

    out: bytes
    into: bytes
    buffer: NDArray[np.float32]
    incoming: NDArray[np.float32] | None = None
    rows: int = 0
    hits_out: int = 0
    hits_in: int = 0
    _count: int = 0
    _stops: tuple[int, ...] = ()
    _next: int = 0
    _seen: list[int] = field(default_factory=list)
    _learned: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)
    _shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.callback = native.api.ggml_backend_sched_eval_callback(self._evaluate)

    def begin(self, shape: tuple[int, ...], rows: int, incoming: NDArray[np.float32] | None) -> None:
        """Prepare for one decode of `rows` rows; graphs of equal `shape` have their nodes in equal places."""
        self.rows, self.incoming = rows, incoming
        self.hits_out = self.hits_in = self._count = 0
        self._shape = shape
        self._stops = self._learned.get(shape, ())
        self._next = self._stops[0] if self._stops else 0
        self._seen = []

    def end(self) -> bool:
        """True when the decode hit every tensor exactly once; otherwise what was learned of its shape is forgotten."""
        whole = self.hits_out == bool(self.out) and self.hits_in == bool(self.into)
        if not whole:
            self._learned.pop(self._shape, None)
        elif not self._stops:
            if len(self._learned) >= _SHAPES_MAX:
                self._learned.clear()
            self._learned[self._shape] = tuple(self._seen)
        self.incoming = None
        return whole

    def _evaluate(self, tensor: int, ask: bool, _user: object) -> bool:
        if ask:
            self._count = count = self._count + 1
            if count < self._next:
                return False
            return self._asked(tensor, count)
        return self._computed(tensor)

    def _asked(self, tensor: int, count: int) -> bool:
        name = native.tensor_name(tensor)
        if name not in (self.out, self.into):
            return False
        if not self._stops:
            self._seen.append(count)
        return True

    def _computed(self, tensor: int) -> bool:
        name = native.tensor_name(tensor)
        size = self.rows * self.buffer.shape[1] * 4
        if native.tensor_bytes(tensor) != size:
            # Another number of rows or another width: the decode ends with a count that does not fit, a typed error.
            self.hits_out = self.hits_in = -1
            return False
        if name == self.into and self.incoming is not None:
            native.tensor_set(tensor, self.incoming.ctypes.data, 0, size)
            self.hits_in += 1
            self._next = self._stops[-1] if self._stops else 0
            return self.out != name
        native.tensor_get(tensor, self.buffer.ctypes.data, 0, size)
        self.hits_out += 1
        return False
