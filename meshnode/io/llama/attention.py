"""How a model's attention runs, decided from the header once for all stages: KV type and flash attention."""

from __future__ import annotations

from meshnode.io.llama.traits import Keys, ModelTraits

# Values of a block of every quantized KV type (ggml: QK8_0, QK4_0).
KV_BLOCK_VALUES = 32
# llama_init_from_model turns flash attention off for these.
_WITHOUT_FLASH = frozenset({"grok"})


def head_sizes(read: Keys, layers: int) -> tuple[int, int, int, int]:
    """Values of one head: K and V of full layers, K and V of sliding-window layers (llama_model_base::load_hparams)."""
    heads = (read.per_layer("attention.head_count", layers) or [0])[0]
    default = read.number("embedding_length") // heads if heads else 0
    key = read.number("attention.key_length", default)
    value = read.number("attention.value_length", default)
    return (
        key,
        value,
        read.number("attention.key_length_swa", key),
        read.number("attention.value_length_swa", value),
    )


def flash_attention(traits: ModelTraits) -> bool:
    """Whether flash attention runs; pinned on or off, never left to llama.cpp, so that all stages agree."""
    return traits.architecture not in _WITHOUT_FLASH


def default_kv_type(traits: ModelTraits, read: Keys) -> str:
    """q8_0 where llama.cpp takes it (flash attention, heads of whole blocks), else f16."""
    sizes = head_sizes(read, traits.layers)
    whole_blocks = all(size % KV_BLOCK_VALUES == 0 for size in sizes)
    return "q8_0" if whole_blocks and flash_attention(traits) else "f16"
