"""What a model costs, computed from its header alone: the planner's input.

Formulas follow llama-hparams.cpp at the pinned version (n_embd_k_gqa, n_embd_v_gqa, n_embd_r, n_embd_s); a test
compares them with the bytes that llama.cpp reports for each family.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from gguf.constants import GGMLQuantizationType

from meshnode.core.planning.footprint import LayerFootprint, ModelFootprint
from meshnode.errors import ModelError
from meshnode.io.llama.attention import default_kv_type, flash_attention, head_sizes
from meshnode.io.llama.gguf_file import GgufModel, Tensor, open_model
from meshnode.io.llama.manifest import group_tensors, layer_count
from meshnode.io.llama.slicing import OUTPUT_WEIGHT
from meshnode.io.llama.traits import Keys, ModelTraits, all_kinds_wanted, traits_of
from meshnode.wire.manifest import EMBEDDING, METADATA, OUTPUT, SHARED, Manifest, TensorEntry, layer_name

_Stored = Tensor | TensorEntry

# Recurrent state is kept in 32-bit floats (llama_memory_recurrent is made with GGML_TYPE_F32).
_STATE_VALUE_BYTES = 4


def read_footprint(path: Path, manifest_digest: str = "") -> ModelFootprint:
    """The footprint of the model at `path`; reads headers only. Errors: ModelError."""
    return footprint_of(open_model(path), manifest_digest, path.stem)


def footprint_of(model: GgufModel, manifest_digest: str = "", file_name: str = "") -> ModelFootprint:
    """The footprint of an opened model. Errors: ModelError for a header that lacks what planning needs."""
    traits = traits_of(model.keys, layer_count(model))
    return _footprint(traits, Keys(model.keys), group_tensors(model), manifest_digest, file_name)


def footprint_of_parts(metadata: Path, manifest: Manifest, digest: str) -> ModelFootprint:
    """The same of a model whose tensors are not here: from its key-values and its manifest. Errors: ModelError."""
    keys = open_model(metadata).keys
    artifacts = {item.name: item.tensors for item in manifest.artifacts if item.name != METADATA}
    return _footprint(traits_of(keys, manifest.layers), Keys(keys), artifacts, digest)


def _footprint(
    traits: ModelTraits, read: Keys, artifacts: Mapping[str, Sequence[_Stored]], digest: str, file_name: str = ""
) -> ModelFootprint:
    groups = {name: sum(tensor.size for tensor in tensors) for name, tensors in artifacts.items()}
    reads = {name: sum(_read_bytes(tensor, read) for tensor in tensors) for name, tensors in artifacts.items()}
    embedding = groups.get(EMBEDDING, 0)
    tied = all(tensor.name != OUTPUT_WEIGHT for tensor in artifacts.get(OUTPUT, ()))
    name = read.scalar_at("general.name")
    context = read.number("context_length")
    if not embedding or context < 1 or read.number("embedding_length") < 1:
        raise ModelError("the GGUF does not say its width, its context length or its token embedding")
    return ModelFootprint(
        manifest_digest=digest,
        name=str(name) if name else file_name,
        architecture=traits.architecture,
        width=read.number("embedding_length"),
        vocabulary=artifacts[EMBEDDING][0].dims[-1],
        context_trained=context,
        layers=_layers(traits, read, groups, reads),
        embedding_bytes=embedding,
        output_bytes=groups.get(OUTPUT, 0) + (embedding if tied else 0),
        shared_bytes=groups.get(SHARED, 0),
        tied=tied,
        kv_type=default_kv_type(traits, read),
        flash_attention=flash_attention(traits),
        boundaries=traits.boundaries,
        forbidden_lengths=traits.row.counts,
        all_kinds_in_each_slice=all_kinds_wanted(traits),
        whole_only=traits.whole,
        weight_kind=_weight_kind(artifacts),
    )


def _weight_kind(artifacts: Mapping[str, Sequence[_Stored]]) -> str:
    """The type of most bytes, as llama.cpp calls it in lower case: it decides how fast weights are computed with."""
    sizes: Counter[int] = Counter()
    for tensor in chain.from_iterable(artifacts.values()):
        sizes[tensor.type] += tensor.size
    return GGMLQuantizationType(sizes.most_common(1)[0][0]).name.lower() if sizes else ""


def _read_bytes(tensor: _Stored, read: Keys) -> int:
    """What one token reads of it: of the experts, which lie in one tensor, those that it is sent to."""
    experts, used = read.number("expert_count"), read.number("expert_used_count")
    return tensor.size * used // experts if "_exps." in tensor.name and 0 < used < experts else tensor.size


def _layers(
    traits: ModelTraits, read: Keys, groups: dict[str, int], reads: dict[str, int]
) -> tuple[LayerFootprint, ...]:
    heads = read.per_layer("attention.head_count_kv", traits.layers)
    heads = heads or read.per_layer("attention.head_count", traits.layers) or [0] * traits.layers
    sizes = head_sizes(read, traits.layers)
    state = _state_values(traits, read) * _STATE_VALUE_BYTES
    indexer = read.number("attention.indexer.key_length")
    types = read.per_layer("attention.indexer.types", traits.layers) if traits.row.indexed else None
    layers = []
    for index in range(traits.layers):
        recurrent = traits.recurrent[index] if traits.recurrent else traits.row.state_in_every_layer
        caches = traits.attentive[index] if traits.attentive else traits.row.cache
        values = _kv_values(read, sizes, heads[index], bool(traits.windowed) and traits.windowed[index])
        values += indexer if types is None or types[index] else 0
        layers.append(
            LayerFootprint(
                weight_bytes=groups.get(layer_name(index), 0),
                read_bytes=reads.get(layer_name(index), 0),
                kv_values=values if caches else 0,
                state_bytes=state if recurrent else 0,
                kind=traits.kind(index),
            )
        )
    return tuple(layers)


def _kv_values(read: Keys, sizes: tuple[int, int, int, int], heads: int, windowed: bool) -> int:
    key, value = sizes[2:] if windowed else sizes[:2]
    if read.number("attention.key_length_mla"):
        value = 0  # latent attention keeps one compressed row, of which V is a part
    return (key + value) * heads


def _state_values(traits: ModelTraits, read: Keys) -> int:
    """Values of recurrent state of one layer and lane: n_embd_r + n_embd_s of llama-hparams.cpp."""
    width = read.number("embedding_length")
    taps = read.number("shortconv.l_cache")
    if taps:
        return width * (taps - 1)
    kernel, heads = read.number("ssm.conv_kernel"), (read.per_layer("attention.head_count", traits.layers) or [0])[0]
    head = read.number("kda.head_dim")
    if head:
        return 3 * (kernel - 1 if kernel else 3) * heads * head + head * head * heads
    inner, state = read.number("ssm.inner_size"), read.number("ssm.state_size")
    rows = inner + 2 * read.number("ssm.group_count") * state
    return max(kernel - 1, 0) * rows + state * inner
