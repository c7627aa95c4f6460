"""What layers cost at a given context, and how much context a split leaves room for.

Context budget of a stage = (usable - weights - state - reserve) / KV bytes per token of the slice's own layers; of a
plan, the smallest over its stages, capped by the trained context. KV is unified: lanes do not multiply its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from meshnode.core.planning.footprint import ModelFootprint, kv_bytes

STAGE_RESERVE_BYTES = 150_000_000
"""Compute buffers, the interpreter and libraries of one stage: the bar that STAGES holds every stage to."""

CELL_GRAIN = 256
"""llama.cpp pads a context to whole 256 cells (`GGML_PAD(n_ctx, 256)` in llama-context.cpp)."""

COMFORTABLE_CONTEXT = 8192
"""In automatic mode more nodes are taken until this much fits, and no more: a chat with a few documents. Beyond it
fewer nodes are worth more than more context ("more nodes made it slower"); `--context` asks for more."""

MINIMUM_CONTEXT = 512
"""In automatic mode less is a shortfall: a system prompt and one answer."""


@dataclass(frozen=True)
class Costs:
    """Bytes of any slice at one (context, lanes, KV type)."""

    prefix: tuple[int, ...]
    """`prefix[b] - prefix[a]`: weights, KV and state of layers [a, b)."""
    each: int
    """What every stage takes beside its layers: reserve and shared tensors."""
    embedding: int
    output: int
    whole_saving: int
    """A whole tied model keeps one copy of its token embedding."""
    layers: int
    """Of the model."""

    def need(self, first: int, last: int) -> int:
        """Bytes that the slice [first, last) takes on its node. Grows with `last`."""
        total = self.prefix[last] - self.prefix[first] + self.each
        if first == 0:
            total += self.embedding
        if last == self.layers:
            total += self.output - (self.whole_saving if first == 0 else 0)
        return total


def cells(context: int) -> int:
    """KV cells that llama.cpp allocates for `context` tokens."""
    return -(-context // CELL_GRAIN) * CELL_GRAIN


def layer_kv_bytes(footprint: ModelFootprint, context: int, kv_type: str) -> tuple[int, ...]:
    """KV bytes of each layer for `context` tokens in all lanes together."""
    count = cells(context)
    return tuple(kv_bytes(layer.kv_values, kv_type) * count for layer in footprint.layers)


def costs_of(footprint: ModelFootprint, context: int, lanes: int, kv_type: str) -> Costs:
    """Prices of every possible slice."""
    caches = layer_kv_bytes(footprint, context, kv_type)
    layers = [
        layer.weight_bytes + layer.state_bytes * lanes + cache
        for layer, cache in zip(footprint.layers, caches, strict=True)
    ]
    return Costs(
        prefix=tuple(accumulate(layers, initial=0)),
        each=STAGE_RESERVE_BYTES + footprint.shared_bytes,
        embedding=footprint.embedding_bytes,
        output=footprint.output_bytes,
        whole_saving=footprint.embedding_bytes if footprint.tied else 0,
        layers=len(layers),
    )


def automatic_targets(footprint: ModelFootprint) -> tuple[int, ...]:
    """Contexts that an automatic plan aims at, best first; the plan then takes all that its nodes have room for."""
    targets = []
    target = COMFORTABLE_CONTEXT
    while target >= MINIMUM_CONTEXT:
        targets.append(min(target, footprint.context_trained))
        target //= 2
    return tuple(dict.fromkeys(targets))
