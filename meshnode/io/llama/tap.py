"""The tap: take activations out of a running graph, and put them in, through llama.cpp's evaluation callback.

Every architecture can do with it; where `kept_tap.KeptTap` gives the same bits, that is some 80 us a token cheaper.

The callback is entered for every node of the graph, so all it does is count. Where the wanted tensors lie is learned by
name once for each shape of batch; from then on the count says it, and the name is only checked there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from meshnode.io.llama import native
from meshnode.io.llama.batch import RowBuffer
from meshnode.io.llama.native import api

# Shapes of batch to remember; a stage sees a few (decode of 1 to lanes rows, prefill chunks of any length).
_SHAPES_MAX = 1_024
# Beyond any node count: nothing more to look for in this graph.
_NEVER = 1 << 40
# The callback is called with (tensor, ask, user data). Declared with its first argument only, it costs 0.09 us instead
# of 0.14 us a node; what comes in further registers is ignored by every C calling convention that llama.cpp runs on.
# Whether it is asked or told follows from its own last answer.
_Callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)


class Tap:
    """Copies `buffer` into the tensor `into`, and later the tensor `out` into `buffer`, of every graph that runs.

    An empty `out` lets the graph run to its end, an empty `into` feeds nothing.
    """

    def __init__(self, out: bytes, into: bytes, buffer: RowBuffer) -> None:
        self.out, self.into = out, into
        self._wanted = {name for name in (out, into) if name}
        self._buffer = buffer.address
        self._row_bytes = buffer.row_bytes
        self._size = 0
        self._hits_out = self._hits_in = 0
        self._told = False
        self._seen: list[int] = []
        self._stops: tuple[int, ...] = ()
        self._shape: tuple[int, ...] = ()
        self._learned: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._restart, self._kept = self._counter()

    def attach(self, parameters: Any) -> None:
        """Be called by the context that is made with `parameters`."""
        parameters.cb_eval = ctypes.cast(self._kept, api.ggml_backend_sched_eval_callback)

    def _counter(self) -> tuple[Callable[[int], None], Any]:
        """The callback, and what sets the count at which it looks closer. Closure variables: the cheapest in Python."""
        count, stop = 0, 0

        def evaluate(tensor: int) -> bool:
            nonlocal count, stop
            count += 1
            if count < stop:
                return False
            if self._told:
                count -= 1
                answer = self._computed(tensor)
                stop = next((place for place in self._stops if place > count), _NEVER) if self._stops else 0
                return answer
            return self._asked(tensor, count)

        def restart(first: int) -> None:
            nonlocal count, stop
            count, stop = 0, first

        return restart, _Callback(evaluate)

    def begin(self, lanes: Sequence[int]) -> None:
        """Prepare for one decode of rows of these lanes; as many of as many lanes have their nodes in equal places."""
        shape = (len(lanes), len(set(lanes)))
        self._size = len(lanes) * self._row_bytes
        self._hits_out = self._hits_in = 0
        self._told = False
        self._shape = shape
        self._stops = self._learned.get(shape, ())
        self._seen = []
        self._restart(self._stops[0] if self._stops else 0)

    def end(self, _context: int) -> bool:
        """After a decode that succeeded: True when it hit every tensor exactly once, else its shape is forgotten."""
        whole = self._hits_out == bool(self.out) and self._hits_in == bool(self.into)
        if not whole:
            self._learned.pop(self._shape, None)
        elif not self._stops:
            if len(self._learned) >= _SHAPES_MAX:
                self._learned.clear()
            self._learned[self._shape] = tuple(self._seen)
        return whole

    def close(self) -> None:
        """Nothing native is held."""

    def _asked(self, tensor: int, count: int) -> bool:
        if native.tensor_name(tensor) not in self._wanted:
            return False
        if not self._stops:
            self._seen.append(count)
        self._told = True
        return True

    def _computed(self, tensor: int) -> bool:
        self._told = False
        name = native.tensor_name(tensor)
        if native.tensor_bytes(tensor) != self._size:
            # Another number of rows or another width (several microbatches in one, reordered lanes): a typed error.
            self._hits_out = self._hits_in = -1
            return False
        if name == self.into:
            native.tensor_set(tensor, self._buffer, 0, self._size)
            self._hits_in += 1
            return True
        native.tensor_get(tensor, self._buffer, 0, self._size)
        self._hits_out += 1
        return False
