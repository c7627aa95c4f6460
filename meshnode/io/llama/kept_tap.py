"""The cheap tap: the tensor that leaves a slice is kept by the graph and read after the decode, with no callback.

llama.cpp lets a sampler of the caller add to each graph that it builds (`llama_sampler_i.backend_apply` of llama.h,
meant for sampling on the device). This one adds nothing: it looks the tensor up by name and marks it as an output, so
that no later node is computed into its memory. It is asked when a graph is built, once in some 256 tokens, where the
evaluation callback (`tap.Tap`) is entered for each of 520 nodes of each decode of 12 layers.

Invariant: what it gives is held against what the callback gives when a slice is loaded (`SliceEngine`), bit for bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from meshnode.io.llama import native
from meshnode.io.llama.batch import RowBuffer
from meshnode.io.llama.native import api

# Indexing a library makes a function of our own (as in `batch`): no conversion of the address.
_synchronize = api._lib["llama_synchronize"]
_synchronize.argtypes, _synchronize.restype = [ctypes.c_void_p], None


class KeptTap:
    """Copies the tensor `out` into `buffer` after each decode. All of the graph runs: `out` is of the last layer.

    `lane` is one that no row is of: a sampler belongs to a lane, and one with rows would have to sample them.
    """

    def __init__(self, out: bytes, buffer: RowBuffer, lane: int) -> None:
        self._out = out
        self._buffer = buffer
        self._wanted = 0
        self._tensor: int | None = None
        self._size = 0
        # Where only processors compute, a decode that has returned has computed; a device may not have.
        self._waits = bool(api.llama_supports_gpu_offload())
        # Native code holds the addresses of all of these until `close`.
        self._interface = api.llama_sampler_i(
            name=api.llama_sampler_i_name(lambda _sampler: b"meshnode-tap"),
            apply=api.llama_sampler_i_apply(lambda _sampler, _candidates: None),
            backend_init=api.llama_sampler_i_backend_init(lambda _sampler, _buffers, _outputs: True),
            backend_apply=api.llama_sampler_i_backend_apply(self._built),
        )
        self._chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        api.llama_sampler_chain_add(self._chain, api.llama_sampler_init(ctypes.byref(self._interface), None))
        self._of_lane = api.llama_sampler_seq_config(lane, ctypes.cast(self._chain, ctypes.c_void_p))

    def attach(self, parameters: Any) -> None:
        """Take part in the context that is made with `parameters`; in one only."""
        parameters.samplers, parameters.n_samplers = ctypes.pointer(self._of_lane), 1

    def _built(self, _sampler: Any, _graph_context: Any, graph: int, sampling: Any) -> None:
        # First: should the look-up fail, then every decode says so.
        self._tensor = None
        # Whatever stands here would be computed: nothing shall be sampled.
        sampling[0].logits = None
        tensor = native.graph_tensor(graph, self._out)
        if tensor:
            native.set_output(tensor)
            self._tensor, self._size = tensor, native.tensor_bytes(tensor)

    def begin(self, lanes: Sequence[int]) -> None:
        """Prepare for one decode of rows of these lanes."""
        self._wanted = len(lanes) * self._buffer.row_bytes

    def end(self, context: int) -> bool:
        """After a decode that succeeded: take its rows. False when the graph has no such tensor of so many rows."""
        if self._tensor is None or self._size != self._wanted:
            return False
        if self._waits:
            _synchronize(context)
        native.tensor_get(self._tensor, self._buffer.address, 0, self._size)
        return True

    def close(self) -> None:
        """Free what is native. The context must be gone."""
        api.llama_sampler_free(self._chain)
