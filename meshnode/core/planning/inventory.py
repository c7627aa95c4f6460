"""What each node offers, as the planner sees it.

Invariant: `usable_bytes` is what may be used, all of it: the head-room is taken off where memory is *measured*
(`offered_bytes`), never off a limit that a person set, and never by the planner.
"""

from __future__ import annotations

import msgspec

from meshnode.identity.ids import NodeId

HEADROOM_PERCENT = 15
"""Of measured free memory: other programs grow, and the system's page cache needs some (COORDINATION, planner)."""

_GRAIN = 64 << 20
"""Measured memory is offered in steps of 64 MiB, so that noise between two starts does not move the cuts of a plan (and
with them the cached slices)."""


class NodeInventory(msgspec.Struct, frozen=True, omit_defaults=True):
    """One node. What is unknown is 0 or empty; `pace` says what is then assumed."""

    node: NodeId
    name: str
    usable_bytes: int
    """For slices, KV cache and compute buffers of new runs: what other runs hold is already taken off."""
    cores: int = 0
    """Cores that one stage may compute with; 0: the node decides."""
    cached: dict[str, tuple[str, ...]] = {}
    """Artifact names by manifest digest that lie on its disk, verified."""
    decode_bytes_per_s: int = 0
    """Weights read per second while decoding one row: memory bandwidth as llama.cpp gets it."""
    prefill_bytes_per_s: int = 0
    """The same per row of a full prefill chunk."""
    layer_us: int = 0
    """What every layer of a decode step takes beside reading its weights: nodes of the graph, threads meeting."""
    stage_us: int = 0
    """What a step of a stage takes beside its layers: frames in and out, the wake-up of a process."""
    excluded: str = ""
    """Why it may not take part (see `participants.REASONS`); empty when it may."""


class LinkInventory(msgspec.Struct, frozen=True, omit_defaults=True):
    """Measured from one node to another; a pair that is not listed is reachable at unknown speed."""

    source: NodeId
    target: NodeId
    rtt_us: int = 0
    bytes_per_s: int = 0
    reachable: bool = True


class Inventory(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything the planner knows about machines. The order of entries carries no meaning."""

    nodes: tuple[NodeInventory, ...]
    links: tuple[LinkInventory, ...] = ()
    head: NodeId = NodeId("")
    """Where the head will be, of a node that has not got the model file; empty: with the author of the demand, who has
    it."""


def offered_bytes(measured: int, limit: int | None) -> int:
    """Bytes a node offers: a person's `limit` as it is, else `measured` free memory less head-room, in whole steps."""
    if limit is not None:
        return limit
    return measured * (100 - HEADROOM_PERCENT) // 100 // _GRAIN * _GRAIN
