"""Who may take layers, by exact node id, and what each would have to fetch."""

from __future__ import annotations

import msgspec

from meshnode.core.planning.context import STAGE_RESERVE_BYTES
from meshnode.core.planning.demand import Demand
from meshnode.core.planning.footprint import ModelFootprint
from meshnode.core.planning.inventory import Inventory, NodeInventory
from meshnode.identity.ids import NodeId

REASONS = {
    "not_pinned": "is not among the nodes that were asked for",
    "too_small": "offers less than one layer and its buffers take",
    "unreachable": "cannot be reached",
    "draining": "is leaving or draining",
    "suspect": "has not been heard of for a moment",
    "refused": "refused the last claim",
    "failed": "failed at the last attempt",
    "incompatible": "runs another protocol or llama.cpp version",
    "client": "may use the mesh but not serve in it",
}
"""Why a node is left out of a plan; an unknown reason is shown as it is."""


class Exclusion(msgspec.Struct, frozen=True):
    """A node that takes no layers, and why."""

    node: NodeId
    name: str
    usable_bytes: int
    reason: str


def participants_of(
    demand: Demand, footprint: ModelFootprint, inventory: Inventory
) -> tuple[tuple[NodeInventory, ...], tuple[Exclusion, ...]]:
    """Nodes that may take layers (largest memory first, then lower id), and the others, each with its reason.

    ValueError: a node is listed twice.
    """
    nodes = sorted(inventory.nodes, key=lambda node: (-node.usable_bytes, node.node))
    if len({node.node for node in nodes}) != len(nodes):
        raise ValueError("the inventory lists a node twice")
    least = STAGE_RESERVE_BYTES + footprint.shared_bytes + min(layer.weight_bytes for layer in footprint.layers)
    taking: list[NodeInventory] = []
    left_out: list[Exclusion] = []
    for node in nodes:
        reason = node.excluded
        if not reason and demand.pins and node.node not in demand.pins:
            reason = "not_pinned"
        if not reason and node.usable_bytes < least:
            reason = "too_small"
        if reason:
            left_out.append(Exclusion(node.node, node.name, node.usable_bytes, reason))
        else:
            taking.append(node)
    return tuple(taking), tuple(left_out)


def fetch_bytes(footprint: ModelFootprint, node: NodeInventory, first: int = 0, last: int | None = None) -> int:
    """Weight bytes of layers [first, last) (with embedding and output where the slice needs them) that `node` lacks."""
    count = len(footprint.layers)
    last = count if last is None else last
    cached = frozenset(node.cached.get(footprint.manifest_digest, ()))
    missing = sum(
        footprint.layers[index].weight_bytes for index in range(first, last) if f"layer.{index}" not in cached
    )
    if first == 0 and "embedding" not in cached:
        missing += footprint.embedding_bytes
    if last == count and "output" not in cached:
        missing += footprint.output_bytes
    if "shared" not in cached:
        missing += footprint.shared_bytes
    return missing
