"""Who may take layers, by exact node id, and what each would have to fetch."""

from __future__ import annotations

from itertools import accumulate

import msgspec

from meshnode.core.planning.context import STAGE_RESERVE_BYTES
from meshnode.core.planning.footprint import ModelFootprint
from meshnode.core.planning.inventory import Inventory, NodeInventory
from meshnode.identity.ids import NodeId
from meshnode.wire.demand import Demand
from meshnode.wire.manifest import EMBEDDING, OUTPUT, SHARED, layer_name

REASONS = {
    "not_pinned": "is not among the nodes that were asked for",
    "excluded_by_user": "was excluded by the user",
    "replica": "serves another replica",
    "too_small": "offers less than one layer and its buffers take",
    "unreachable": "cannot be reached",
    "draining": "is leaving or draining",
    "left": "was stopped",
    "suspect": "has not been heard of for a moment",
    "refused": "refused the last claim",
    "failed": "failed at the last attempt",
    "incompatible": "runs another protocol or llama.cpp version",
    "client": "may use the mesh but not serve in it",
}
"""Why a node is left out of a plan; an unknown reason is shown as it is."""

_STILL_HERE = frozenset({"", "refused", "failed"})
_GONE = frozenset({"unreachable", "left"})


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
        if not reason and node.node in demand.excludes:
            reason = "excluded_by_user"
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
    *layers, embedding, output, shared = missing_bytes(footprint, node)
    ends = (embedding if first == 0 else 0) + (output if last == count else 0)
    return layers[last] - layers[first] + ends + shared


def head_of(demand: Demand, inventory: Inventory) -> NodeId | None:
    """Where the head will be: with the author, who has the file, as long as it takes part in the mesh, also when it
    takes no layers. None: where stage 0 is."""
    present = {node.node for node in inventory.nodes if node.excluded in _STILL_HERE}
    head = inventory.head or demand.author
    return head if head in present else None


def has_file(demand: Demand, inventory: Inventory) -> NodeId:
    """Who has the whole model without telling; nobody (empty) where the author does not coordinate: then what is told
    counts."""
    return NodeId("") if inventory.head else demand.author


def missing_bytes(footprint: ModelFootprint, node: NodeInventory) -> tuple[int, ...]:
    """Prefix sums over the layers of what `node` lacks of them, then what it lacks of embedding, output, shared."""
    held = frozenset(node.cached.get(footprint.manifest_digest, ()))
    layers = (0 if layer_name(index) in held else layer.weight_bytes for index, layer in enumerate(footprint.layers))
    rest = ((EMBEDDING, footprint.embedding_bytes), (OUTPUT, footprint.output_bytes), (SHARED, footprint.shared_bytes))
    return (*accumulate(layers, initial=0), *(0 if name in held else size for name, size in rest))


def lost_layers(demand: Demand, footprint: ModelFootprint, inventory: Inventory) -> tuple[int, ...]:
    """Layers that nobody has who can be reached; none while the author, who has the file, is here."""
    sources = [node for node in inventory.nodes if node.excluded not in _GONE]
    if any(node.node == has_file(demand, inventory) for node in sources):
        return ()
    held = {name for node in sources for name in node.cached.get(footprint.manifest_digest, ())}
    return tuple(index for index in range(len(footprint.layers)) if layer_name(index) not in held)


def away_with(
    demand: Demand, footprint: ModelFootprint, inventory: Inventory, lost: tuple[int, ...]
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Who is away and said before that it has layers of `lost`: name and those layers, who has most first."""
    found = []
    for node in inventory.nodes:
        names = node.cached.get(footprint.manifest_digest, ()) if node.excluded in _GONE else ()
        layers = tuple(index for index in lost if layer_name(index) in names)
        if node.excluded in _GONE and node.node == has_file(demand, inventory):
            layers = lost
        if layers:
            found.append((-len(layers), node.node, node.name, layers))
    return tuple((name, layers) for _, _, name, layers in sorted(found))


def round_trips(author: NodeId, inventory: Inventory) -> dict[NodeId, int]:
    """Microseconds from the author to each node and back, as measured at either end; the shorter where both did."""
    found: dict[NodeId, int] = {}
    for link in inventory.links:
        if link.rtt_us > 0 and author in (link.source, link.target):
            other = link.target if link.source == author else link.source
            found[other] = min(link.rtt_us, found.get(other, link.rtt_us))
    return found
