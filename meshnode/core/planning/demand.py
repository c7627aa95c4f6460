"""What a demand may ask for: the options that a plan answers.

Invariant: what a user set is planned exactly or refused, never changed; 0 and "" mean "choose for me".
"""

from __future__ import annotations

from meshnode.core.planning.cuts import pinned_cuts
from meshnode.core.planning.footprint import KV_BLOCK_BYTES, ModelFootprint
from meshnode.errors import ConfigError, ModelError
from meshnode.wire.demand import Demand
from meshnode.wire.limits import LANES

DEFAULT_LANES = 4
"""Streams that a household or small team has open at once; with unified KV each costs only its share of the cells."""

REPLICAS = 16
"""Pipelines of one demand: a mesh of 16 machines that each hold the model."""

_LAYERS_MAX = 512  # LLAMA_MAX_LAYERS of llama.cpp
_BYTES_MAX = 1 << 50  # one petabyte: sums of 512 of them stay below 64 bits
_STATE_MAX = 1 << 40  # of one layer and lane: the same for 64 lanes
_VALUES_MAX = 1 << 24  # cached a token and layer: the widest known keep 2^16
_CONTEXT_MAX = 1 << 26  # tokens: the longest known are 10 million


def resolve_kv_type(demand: Demand, footprint: ModelFootprint) -> str:
    """The KV type to plan and load with. Errors: ConfigError for one that is unknown or that this model cannot use."""
    wanted = demand.kv_type or footprint.kv_type
    if wanted not in KV_BLOCK_BYTES:
        raise ConfigError(f"unknown KV type {wanted!r}", f"Choose one of {', '.join(KV_BLOCK_BYTES)}.")
    quantized = wanted.startswith("q")
    if quantized and not (footprint.flash_attention and footprint.kv_type.startswith("q")):
        raise ConfigError(
            f"{footprint.name} cannot use KV type {wanted}: it needs flash attention and heads in multiples of 32",
            "Leave --kv-type out, or choose f16.",
        )
    return wanted


def check_demand(demand: Demand, footprint: ModelFootprint) -> None:
    """Refuse what no mesh could serve. Errors: ConfigError (the user's options), ModelError (the footprint)."""
    _check_footprint(footprint)
    pinned_cuts(footprint, demand.cuts)
    if not 0 <= demand.replicas <= REPLICAS:
        raise ConfigError(f"{demand.replicas} replicas are not possible", f"Choose 1 to {REPLICAS}.")
    if demand.manifest_digest != footprint.manifest_digest:
        raise ConfigError(
            f"the demand names manifest {demand.manifest_digest[:12]},"
            f" the footprint is of {footprint.manifest_digest[:12]}"
        )
    if not 0 <= demand.lanes <= LANES:
        raise ConfigError(f"{demand.lanes} lanes are not possible", f"Choose 1 to {LANES}, or leave --lanes out for 4.")
    if demand.context < 0:
        raise ConfigError(
            f"a context of {demand.context} tokens is not possible", "Leave --context out to get the most."
        )
    if demand.context > footprint.context_trained:
        raise ConfigError(
            f"{footprint.name} was trained for {footprint.context_trained} tokens of context, not {demand.context}",
            f"Choose --context {footprint.context_trained} or less, or leave it out.",
        )


def _check_footprint(footprint: ModelFootprint) -> None:
    count = len(footprint.layers)
    if not 1 <= count <= _LAYERS_MAX:
        raise ModelError(f"a model of {count} layers cannot be planned")
    sizes = [footprint.embedding_bytes, footprint.output_bytes, footprint.shared_bytes]
    for layer in footprint.layers:
        if layer.weight_bytes <= 0:
            raise ModelError(f"the size of a layer of {footprint.name} is unknown")
        if not 0 <= layer.read_bytes <= layer.weight_bytes:
            raise ModelError(f"the footprint of {footprint.name} holds impossible sizes")
        if not (0 <= layer.kv_values <= _VALUES_MAX and 0 <= layer.state_bytes <= _STATE_MAX):
            raise ModelError(f"the footprint of {footprint.name} holds impossible sizes")
        sizes.append(layer.weight_bytes)
    if min(sizes) < 0 or max(sizes) > _BYTES_MAX or not 1 <= footprint.context_trained <= _CONTEXT_MAX:
        raise ModelError(f"the footprint of {footprint.name} holds impossible sizes")
    if footprint.tied and footprint.output_bytes < footprint.embedding_bytes:
        raise ModelError(f"the footprint of {footprint.name} says that its output is its embedding, and smaller")
    if any(not 0 < cut < count for cut in footprint.boundaries):
        raise ModelError(f"the footprint of {footprint.name} allows cuts outside the model")
