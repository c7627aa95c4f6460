"""Key-values of a slice: per-layer arrays cut by a table of keys, patterns written out, constants of the whole kept.

Invariant: a key that may hold one value a layer and is in no table is a refusal, never copied on trust.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from meshnode.errors import ModelError
from meshnode.io.llama.architectures import WayIn
from meshnode.io.llama.gguf_values import KeyValue, Scalar, ValueType, make_array, make_scalar
from meshnode.io.llama.traits import Keys, ModelTraits

# Our own keys, which llama.cpp ignores and the engine reads: which tensor leaves the slice, which one is replaced by
# what comes in (empty: activations come in as embedding rows).
TAP_KEY = "meshnode.tap"
INTO_KEY = "meshnode.into"
# Rows of the table of zeros that a slice without vocabulary carries: llama.cpp wants a table, and one that its
# matrix kernels take.
EMPTY_VOCABULARY = 32
# Keys whose arrays hold one value a layer, under `<architecture>.` or, where they have no architecture, in full.
PER_LAYER_KEYS = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.sliding_window_pattern",
        "attention.recurrent_layers",
        "attention.indexer.types",
        "attention.compress_ratios",
        "attention.rope_pattern",
        "expert_feed_forward_length",
        "expert_used_count",
        "feed_forward_length",
        "swiglu_clamp_exp",
        "swiglu_clamp_shexp",
        "xielu.alpha_n",
        "xielu.alpha_p",
        "xielu.beta",
        "xielu.eps",
    }
)
# Arrays that may have the length of the layers by accident and are not per layer.
OTHER_ARRAYS = frozenset({"rope.dimension_sections", "deepstack_mapping"})


@dataclass(frozen=True)
class LayerUse:
    """A layer of a slice: layer `source` of the model, or a pass-through copy of its shape (all weights zero)."""

    source: int
    passing: bool = False


def slice_order(traits: ModelTraits, first: int, last: int) -> list[LayerUse]:
    """The layers of slice [first, last) in order: its own, and pass-through layers of kinds that it would lack.

    A layer whose weights are zero adds zero to the residual stream: the same bits go on. It stands behind the tap of a
    slice that is not the last and never runs there; in the last it stands first. Errors: ModelError where no layer can
    stand in.
    """
    order = [LayerUse(index) for index in range(first, last)]
    for kind in traits.missing(first, last):
        if not any(traits.is_a(use.source, kind) for use in order):
            order = _with_kind(traits, order, kind)
    return order


def _with_kind(traits: ModelTraits, order: list[LayerUse], kind: str) -> list[LayerUse]:
    sources = [index for index in range(traits.layers) if traits.is_a(index, kind)]
    final = max(use.source for use in order if not use.passing) == traits.layers - 1
    for index in sorted(sources, key=lambda source: min(abs(source - use.source) for use in order)):
        passing = LayerUse(index, passing=True)
        # The last slice has no tap, and its last layer runs only on the rows that want logits: to keep the shapes
        # of the whole model, that layer stays the last.
        extended = [passing, *order] if final else [*order, passing]
        if _expressible(traits, extended):
            return extended
    raise ModelError(f"a slice of layers {order[0].source} to {order[-1].source} lacks a {kind} layer")


def _expressible(traits: ModelTraits, order: Sequence[LayerUse]) -> bool:
    """Whether keys can say this order: dense layers lead, and what layer numbers choose stays as it was."""
    dense = [use.source < traits.dense_lead for use in order]
    if dense != sorted(dense, reverse=True):
        return False
    own = [(index, use.source) for index, use in enumerate(order) if not use.passing]
    steps = traits.row.steps
    return all(((i + add) % period == 0) == ((s + add) % period == 0) for period, add in steps for i, s in own)


def slice_keys(keys: Sequence[KeyValue], traits: ModelTraits, order: Sequence[LayerUse]) -> list[KeyValue]:
    """The key-values of a slice whose layers are `order`. Errors: ModelError."""
    own = [index for index, use in enumerate(order) if not use.passing]
    final = order[own[-1]].source == traits.layers - 1
    if len(own) == traits.layers:
        return _whole_keys(keys, traits)
    changed = _changed(Keys(keys), traits, order, final)
    into = traits.row.input_tensor if order[own[0]].source else "embd"
    changed[TAP_KEY] = make_scalar(TAP_KEY, ValueType.STRING, "" if final else f"{traits.row.tap}-{own[-1]}")
    overwritten = traits.row.way_in is WayIn.OVERWRITE
    changed[INTO_KEY] = make_scalar(INTO_KEY, ValueType.STRING, into if overwritten else "")
    kept: list[KeyValue] = []
    prefix = traits.architecture + "."
    for item in keys:
        name = item.key.removeprefix(prefix)
        if item.key in changed or item.key.startswith("split.") or (not final and item.key.startswith("tokenizer.")):
            continue
        scoped = name != item.key or name in PER_LAYER_KEYS
        kept.append(_array(item, name, traits.layers, order) if scoped and item.type is ValueType.ARRAY else item)
    return [*kept, *(item for item in changed.values() if item is not None)]


def _whole_keys(keys: Sequence[KeyValue], traits: ModelTraits) -> list[KeyValue]:
    """Keys of all layers in one file: those of the model, without the prediction blocks that no manifest holds."""
    extra = Keys(keys).number("nextn_predict_layers")
    kept = []
    for item in keys:
        name = item.key.removeprefix(traits.architecture + ".")
        if extra and name == "block_count":
            kept.append(make_scalar(item.key, ValueType.UINT32, traits.layers))
        elif extra and name == "nextn_predict_layers":
            kept.append(make_scalar(item.key, ValueType.UINT32, 0))
        elif extra and item.count == traits.layers + extra and item.item_type is not None:
            kept.append(make_array(item.key, item.item_type, item.items()[: traits.layers]))
        elif not item.key.startswith("split."):
            kept.append(item)
    return kept


def _array(item: KeyValue, name: str, layers: int, order: Sequence[LayerUse]) -> KeyValue:
    if name in PER_LAYER_KEYS:
        values, kind = item.items(), item.item_type
        if len(values) < layers or kind is None:
            raise ModelError(f"the GGUF key {item.key!r} has {len(values)} values for {layers} layers")
        return make_array(item.key, kind, [values[use.source] for use in order])
    if item.count == layers and name not in OTHER_ARRAYS:
        raise ModelError(f"the GGUF key {item.key!r} may hold one value a layer, and is not known to this version")
    return item


def _changed(read: Keys, traits: ModelTraits, order: Sequence[LayerUse], final: bool) -> dict[str, KeyValue | None]:
    """Keys that a slice has otherwise than the model; None leaves one out."""
    changed: dict[str, KeyValue | None] = {}

    def put(name: str, kind: ValueType, value: Scalar) -> None:
        key = f"{traits.architecture}.{name}"
        changed[key] = make_scalar(key, kind, value)

    put("block_count", ValueType.UINT32, len(order))
    if read.find("nextn_predict_layers") is not None:
        put("nextn_predict_layers", ValueType.UINT32, 0)
    if read.find("leading_dense_block_count") is not None:
        lead = sum(use.source < traits.dense_lead for use in order)
        put("leading_dense_block_count", ValueType.UINT32, lead)
        if traits.moe_step > 1:
            put("interleave_moe_layer_step", ValueType.UINT32, _moe_step(traits, order, lead))
    if not final:
        changed["tokenizer.ggml.model"] = make_scalar("tokenizer.ggml.model", ValueType.STRING, "no_vocab")
        put("vocab_size", ValueType.UINT32, EMPTY_VOCABULARY)
    if next(use.source for use in order if not use.passing) != 0 and (
        traits.row.input_scale is not None or read.find("embedding_scale") is not None
    ):
        put("embedding_scale", ValueType.FLOAT32, 1.0)
    if traits.architecture == "minicpm" and read.find("residual_scale") is None:
        put("residual_scale", ValueType.FLOAT32, 1.4 / math.sqrt(traits.layers))
    _put_patterns(changed, read, traits, order)
    return changed


def _put_patterns(
    changed: dict[str, KeyValue | None], read: Keys, traits: ModelTraits, order: Sequence[LayerUse]
) -> None:
    def put(name: str, kind: ValueType, values: Sequence[Scalar]) -> None:
        key = f"{traits.architecture}.{name}"
        changed[key] = make_array(key, kind, values)

    if traits.windowed and not (traits.row.window is not None and traits.row.window.follows_attention):
        flags = [traits.windowed[use.source] for use in order]
        put("attention.sliding_window_pattern", ValueType.BOOL, flags)
    if traits.recurrent and read.find("full_attention_interval") is not None:
        flags = [traits.recurrent[use.source] for use in order]
        put("attention.recurrent_layers", ValueType.BOOL, flags)
    heads = read.find("attention.head_count")
    if heads is not None and heads.type is ValueType.ARRAY:
        # llama.cpp takes the size of a head from layer 0: a slice must not begin with "no heads" where the model
        # does not.
        counts = read.per_layer("attention.head_count", traits.layers) or []
        sliced = [counts[use.source] for use in order]
        if counts[0] and not sliced[0]:
            put("attention.head_count", ValueType.UINT32, [counts[0], *sliced[1:]])


def _moe_step(traits: ModelTraits, order: Sequence[LayerUse], lead: int) -> int:
    """The step that makes the same layers of `order` mixtures of experts. Errors: ModelError where none does."""
    step = traits.moe_step
    wanted = [use.source >= traits.dense_lead and (use.source + 1) % step == 0 for use in order]
    for candidate in (step, 1, len(order) + 1):
        if wanted == [index >= lead and (index + 1) % candidate == 0 for index in range(len(order))]:
            return candidate
    raise ModelError(f"a slice from layer {order[0].source} would mix up dense and expert layers")
