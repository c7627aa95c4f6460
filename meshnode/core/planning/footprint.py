"""What a model costs, layer by layer: the planner's only knowledge of a GGUF file.

Made from the header by `io.llama.footprint`; pure data, travels in a demand.
"""

from __future__ import annotations

import msgspec

# Bytes that 32 cached values take (ggml block sizes; design STAGES, "KV type").
KV_BLOCK_BYTES = {"f32": 128, "f16": 64, "q8_0": 34, "q4_0": 18}


class LayerFootprint(msgspec.Struct, frozen=True):
    """One transformer block."""

    weight_bytes: int
    """Bytes of its tensors as stored in the GGUF."""
    kv_values: int
    """K and V values cached per token (elements, not bytes); 0 for purely recurrent layers."""
    state_bytes: int = 0
    """Recurrent state per lane, bytes; 0 for attention layers."""
    read_bytes: int = 0
    """Of its weights, those that one token reads: the experts it is sent to, of a mixture of experts. 0: all."""
    kind: int = 0
    """Which kind of layer this is where an architecture mixes kinds (sliding/full, recurrent/attention)."""


class ModelFootprint(msgspec.Struct, frozen=True):
    """A whole model: sizes in bytes, widths in values."""

    manifest_digest: str
    """SHA-256 of the manifest, hex; names the exact bytes."""
    name: str
    architecture: str
    width: int
    vocabulary: int
    context_trained: int
    layers: tuple[LayerFootprint, ...]
    embedding_bytes: int
    """`token_embd`: looked up on the node of stage 0."""
    output_bytes: int
    """What only the last slice needs: output norm, output matrix (the tied `token_embd` included)."""
    shared_bytes: int = 0
    """Tensors that every slice repeats."""
    tied: bool = False
    """`output_bytes` holds the token embedding once more (a whole model keeps one copy)."""
    kv_type: str = "q8_0"
    """The default this model can use: q8_0 where head sizes and flash attention allow, else f16."""
    flash_attention: bool = True
    boundaries: tuple[int, ...] = ()
    """Allowed cut positions, strictly between 0 and the number of layers, ascending."""
    forbidden_lengths: tuple[int, ...] = ()
    """Slice lengths at which the architecture would behave otherwise (STAGES, layer count chooses behaviour)."""
    all_kinds_in_each_slice: bool = False
    """Each slice must hold every `kind` of layer that the model has."""
    weight_kind: str = ""
    """The type that most of its weights have, as llama.cpp calls it in lower case (q8_0, q4_k): speeds differ by it."""
    whole_only: str = ""
    """Why this model cannot be split; empty when it can."""


def kv_bytes(values: int, kv_type: str) -> int:
    """Bytes of `values` cached values of `kv_type`, rounded up to whole blocks. KeyError: unknown type."""
    return -(-values // 32) * KV_BLOCK_BYTES[kv_type]
