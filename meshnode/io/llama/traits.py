"""What the layers of one model are: the architecture's row applied to the file's keys.

The planner learns from here which cuts are allowed, slicing which layers a slice needs beside its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from meshnode.errors import ModelError
from meshnode.io.llama.architectures import TABLE, Architecture, Recurrence
from meshnode.io.llama.gguf_values import KeyValue, Scalar, ValueType

# Below this many possible slices the rule "each slice holds every kind of layer" would keep meshes from serving a
# model; then slices carry a pass-through layer of the missing kind instead.
SLICES_ENOUGH = 4


@dataclass(frozen=True)
class ModelTraits:
    """A model's layers.

    `windowed`, and `recurrent` with `attentive`, have one value a layer, or none where all layers are of one kind; a
    layer that is neither recurrent nor attentive is a feed-forward block of its own.
    """

    architecture: str
    row: Architecture
    layers: int
    windowed: tuple[bool, ...]
    recurrent: tuple[bool, ...]
    attentive: tuple[bool, ...]
    dense_lead: int
    moe_step: int
    boundaries: tuple[int, ...]
    whole: str
    """Why the model cannot be split; empty when it can."""

    def kind(self, layer: int) -> int:
        """Number of the kind of a layer."""
        windowed = bool(self.windowed) and self.windowed[layer]
        recurrent = bool(self.recurrent) and self.recurrent[layer]
        attentive = bool(self.attentive) and self.attentive[layer]
        return int(windowed) + 2 * int(recurrent) + 4 * int(attentive)

    def missing(self, first: int, last: int) -> list[str]:
        """Kinds of layer that llama.cpp wants in a slice (it aborts without) and that [first, last) has not."""
        lacking = []
        if self.windowed and not any(self.windowed[first:last]):
            lacking.append("windowed")
        if self.windowed and self.row.full_layer_needed and all(self.windowed[first:last]):
            lacking.append("full")
        if self.recurrent and not any(self.recurrent[first:last]):
            lacking.append("recurrent")
        if self.recurrent and not any(self.attentive[first:last]):
            lacking.append("attention")
        return lacking

    def is_a(self, layer: int, kind: str) -> bool:
        """Whether a layer is of a kind that `missing` names."""
        if kind in ("windowed", "full"):
            return self.windowed[layer] == (kind == "windowed")
        return (self.recurrent if kind == "recurrent" else self.attentive)[layer]

    @property
    def one_lane_batches(self) -> bool:
        """Recurrent builders reorder the rows of several lanes: their microbatches hold one lane."""
        return bool(self.recurrent) or self.row.state_in_every_layer


class Keys:
    """Key-values of one architecture, read by the names that llama.cpp uses."""

    def __init__(self, keys: Sequence[KeyValue]) -> None:
        self._by_key: Mapping[str, KeyValue] = {item.key: item for item in keys}
        name = self.scalar_at("general.architecture")
        self.architecture = str(name) if name is not None else ""

    def find(self, name: str) -> KeyValue | None:
        """The key-value `<architecture>.<name>`."""
        return self._by_key.get(f"{self.architecture}.{name}")

    def scalar_at(self, key: str) -> Scalar | None:
        """The scalar of a whole key, None where absent or an array."""
        item = self._by_key.get(key)
        return None if item is None or item.type is ValueType.ARRAY else item.scalar()

    def number(self, name: str, default: int = 0) -> int:
        """An integer key. Errors: ModelError for another type."""
        value = self.scalar_at(f"{self.architecture}.{name}")
        if value is None:
            return default
        if not isinstance(value, int):
            raise ModelError(f"the GGUF key {self.architecture}.{name} is not a whole number")
        return value

    def per_layer(self, name: str, layers: int) -> list[int] | None:
        """One number a layer, from a scalar or an array; None where the key is absent."""
        item = self.find(name)
        if item is None:
            return None
        if item.type is not ValueType.ARRAY:
            return [self.number(name)] * layers
        values = item.items()
        if len(values) < layers or not all(isinstance(value, int) for value in values):
            raise ModelError(f"the GGUF key {item.key!r} does not hold one number for each of {layers} layers")
        return [int(value) for value in values[:layers]]


def traits_of(keys: Sequence[KeyValue], layers: int) -> ModelTraits:
    """The traits of a model of `layers` layers. Errors: ModelError for keys that contradict each other."""
    read = Keys(keys)
    row = TABLE.get(read.architecture)
    if row is None:
        unknown = f"the architecture {read.architecture!r} is not in the table of this version"
        return ModelTraits(read.architecture, Architecture(), layers, (), (), (), 0, 0, (), unknown)
    recurrent = _recurrent(row, read, layers)
    attentive = _attentive(row, read, recurrent)
    windowed = _windowed(row, read, layers, recurrent)
    lead = min(read.number("leading_dense_block_count"), layers)
    moe_step = read.number("interleave_moe_layer_step")
    traits = ModelTraits(read.architecture, row, layers, windowed, recurrent, attentive, lead, moe_step, (), row.whole)
    whole = row.whole or _whole_reason(row, read, layers, windowed)
    boundaries = () if whole else tuple(cut for cut in range(1, layers) if _may_begin(traits, read, cut))
    if not whole and layers > 1 and not boundaries:
        whole = f"its pattern of layers repeats in a way that {layers} layers cannot be cut at"
    if layers == 1:
        whole = "it has one layer"
    return replace(traits, boundaries=boundaries, whole=whole)


def _whole_reason(row: Architecture, read: Keys, layers: int, windowed: Sequence[bool]) -> str:
    if layers in row.counts:
        return f"llama.cpp recognises this model by its {layers} layers, and a slice has another number"
    if read.number("num_loops", 1) > 1:
        return "its layers run in a loop"
    if read.architecture == "llama4" and not windowed:
        return "llama.cpp counts its layers to place rotary positions"
    untyped = read.architecture == "glm-dsa" and read.find("attention.indexer.types") is None
    if untyped and read.number("context_length") >= 1 << 20:  # llama.cpp then has a table of its own
        return "its file does not say which layers have an indexer"
    return ""


def _recurrent(row: Architecture, read: Keys, layers: int) -> tuple[bool, ...]:
    if row.recurrence is Recurrence.NONE:
        return ()
    if row.recurrence is Recurrence.INTERVAL:
        given = read.per_layer("attention.recurrent_layers", layers)
        interval = read.number("full_attention_interval", 4)
        if given is None and interval < 1:
            raise ModelError("full_attention_interval is not positive")
        pattern = [bool(value) for value in given] if given else [(i + 1) % interval != 0 for i in range(layers)]
    else:
        heads = read.per_layer("attention.head_count_kv", layers) or read.per_layer("attention.head_count", layers)
        if heads is None:
            raise ModelError("the GGUF does not say how many heads its layers have")
        pattern = [count == 0 for count in heads]
        if row.recurrence is Recurrence.NO_KV_HEADS_NO_FF:
            blocks = read.per_layer("feed_forward_length", layers) or [0] * layers
            pattern = [flag and size == 0 for flag, size in zip(pattern, blocks, strict=True)]
    return tuple(pattern)


def _attentive(row: Architecture, read: Keys, recurrent: Sequence[bool]) -> tuple[bool, ...]:
    attentive = [not flag for flag in recurrent]
    if row.recurrence is Recurrence.NO_KV_HEADS_NO_FF:
        blocks = read.per_layer("feed_forward_length", len(attentive)) or [0] * len(attentive)
        attentive = [flag and size == 0 for flag, size in zip(attentive, blocks, strict=True)]
    return tuple(attentive)


def _windowed(row: Architecture, read: Keys, layers: int, recurrent: Sequence[bool]) -> tuple[bool, ...]:
    window = row.window
    if window is None:
        return ()
    size = read.number("attention.sliding_window", -1)
    if size == 0 or (size < 0 and not window.always):
        return ()
    if window.follows_attention:
        return tuple(not flag for flag in recurrent)
    item = read.find("attention.sliding_window_pattern")
    if item is not None and item.type is ValueType.ARRAY:
        values = read.per_layer("attention.sliding_window_pattern", layers) or []
        return tuple(bool(value) for value in values)
    period = window.period if item is None else read.number("attention.sliding_window_pattern")
    if item is None and period == 0:
        raise ModelError(f"the GGUF does not say which layers of {read.architecture} have a sliding window")
    if period == 0:
        return (True,) * layers
    full = 0 if window.dense_first else period - 1
    return tuple(index % period != full for index in range(layers))


def _may_begin(traits: ModelTraits, read: Keys, cut: int) -> bool:
    """Whether a slice may begin at `cut`: every layer behind it behaves as before when counted from there."""
    rest = range(cut, traits.layers)
    for period, offset in traits.row.steps:
        if any(((i + offset) % period == 0) != ((i - cut + offset) % period == 0) for i in rest):
            return False
    if traits.moe_step > 1 and not _mixes_alike(traits, rest):
        return False
    types = read.per_layer("attention.indexer.types", traits.layers) if traits.row.indexed else None
    # Without an indexer of its own, a layer of full attention looks where an earlier layer's indexer told it.
    return types is None or bool(types[cut]) or (bool(traits.windowed) and traits.windowed[cut])


def _mixes_alike(traits: ModelTraits, rest: range) -> bool:
    """Whether the same layers of `rest` are mixtures of experts when counted from its start."""
    step, lead, cut = traits.moe_step, traits.dense_lead, rest.start
    mixtures = [index >= lead and (index + 1) % step == 0 for index in rest]
    return all(mixtures) or mixtures == [i >= lead and (i - cut + 1) % step == 0 for i in rest]


def all_kinds_wanted(traits: ModelTraits) -> bool:
    """Whether the planner should give each slice every kind of layer.

    A slice that lacks a kind carries a pass-through layer, which takes memory and, in the last slice, time. Where the
    model can be cut into enough slices without any, such cuts are not worth planning.
    """
    if not (traits.windowed or traits.recurrent):
        return False
    kinds = {traits.kind(layer) for layer in range(traits.layers)}
    slices, seen, starts = 0, set[int](), {0, *traits.boundaries, traits.layers}
    for layer in range(traits.layers):
        seen.add(traits.kind(layer))
        if seen == kinds and layer + 1 in starts:
            slices, seen = slices + 1, set()
    return slices >= SLICES_ENOUGH
