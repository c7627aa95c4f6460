"""The planner's honest no: how much memory is needed, how much there is, and what to do about it.

Invariant: made after the search and from its result; what it reports never changes what is planned. Decimal GB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from meshnode.core.planning.context import Costs, costs_of
from meshnode.core.planning.demand import DEFAULT_LANES, Demand
from meshnode.core.planning.footprint import KV_BLOCK_BYTES, ModelFootprint
from meshnode.core.planning.inventory import NodeInventory
from meshnode.core.planning.participants import REASONS, Exclusion, fetch_bytes
from meshnode.identity.ids import NodeId

_STEP_BYTES = 10_000_000
"""A node to add is advised in steps of 0.01 GB."""

Retry = Callable[[Demand, tuple[NodeInventory, ...]], int | None]
"""Plan another demand on other nodes: the context it would get, or None."""


class Participant(msgspec.Struct, frozen=True):
    """A node that would have taken layers."""

    node: NodeId
    name: str
    usable_bytes: int
    cached_bytes: int
    missing_bytes: int


class Shortfall(msgspec.Struct, frozen=True):
    """Why there is no plan."""

    model: str
    reason: str
    """no_nodes | memory | cuts (enough in all, but no allowed cut fits) | whole (must stay on one node)"""
    required_bytes: int
    """Model, KV cache, and what every participating stage takes beside its layers."""
    available_bytes: int
    """Of all participants together; for `whole`, of the largest."""
    short_by_bytes: int
    context: int
    """The context that was asked for, or the smallest that automatic mode accepts."""
    lanes: int
    kv_type: str
    participants: tuple[Participant, ...]
    excluded: tuple[Exclusion, ...]
    advice: str
    detail: str = ""
    """Why the model cannot be split, for `whole`."""

    def lines(self) -> tuple[str, ...]:
        """For people: the numbers, one line per node, the advice."""
        count = len(self.participants)
        head = (
            f"{self.model} with a context of {self.context} tokens ({self.kv_type}) "
            f"needs {gigabytes(self.required_bytes)}, "
            f"available over {count} node{'' if count == 1 else 's'}: {gigabytes(self.available_bytes)}, "
            f"short by {gigabytes(self.short_by_bytes)}"
        )
        explanations = {
            "cuts": "It would be enough in all, but no cut that this architecture allows fits these nodes.",
            "whole": f"This model must stay on one node: {self.detail}.",
        }
        taking = (
            f"{item.name}: offers {gigabytes(item.usable_bytes)}, has {gigabytes(item.cached_bytes)} of the model, "
            f"lacks {gigabytes(item.missing_bytes)}"
            for item in self.participants
        )
        left_out = (
            f"{item.name}: not used, {REASONS.get(item.reason, item.reason)} (offers {gigabytes(item.usable_bytes)})"
            for item in self.excluded
        )
        why = explanations.get(self.reason)
        return (head, *((why,) if why else ()), *taking, *left_out, self.advice)

    def text(self) -> str:
        """`lines` as one text."""
        return "\n".join(self.lines())


@dataclass(frozen=True)
class Wanted:
    """What could not be placed."""

    demand: Demand
    footprint: ModelFootprint
    kv_type: str
    context: int

    @property
    def lanes(self) -> int:
        """Lanes that the numbers are for; automatic lanes give way to one before a shortfall."""
        if self.demand.lanes:
            return self.demand.lanes
        return 1 if any(layer.state_bytes for layer in self.footprint.layers) else DEFAULT_LANES

    def costs(self) -> Costs:
        """Prices at the context that was wanted."""
        return costs_of(self.footprint, self.context, self.lanes, self.kv_type)


def gigabytes(count: int) -> str:
    """Decimal GB with two digits; below one GB in MB, rounded up: something is never shown as nothing."""
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{-(-count // 100_000) / 10:.1f} MB"


def explain(
    wanted: Wanted, nodes: tuple[NodeInventory, ...], excluded: tuple[Exclusion, ...], retry: Retry
) -> Shortfall:
    """The shortfall of a demand that found no placement on `nodes`."""
    costs = wanted.costs()
    whole = costs.need(0, costs.layers)
    rooms = [node.usable_bytes for node in nodes]
    footprint = wanted.footprint
    largest_only = bool(footprint.whole_only) or not footprint.boundaries
    counted = 1 if largest_only else max(1, len(nodes))
    required = whole + costs.each * (counted - 1)
    available = max(rooms, default=0) if largest_only else sum(rooms)
    extra = _node_to_add(wanted, nodes, retry, whole)
    if not nodes:
        reason = "no_nodes"
    elif largest_only:
        reason = "whole"
    else:
        reason = "memory" if available < required else "cuts"
    detail = footprint.whole_only or ("its architecture allows no cut" if largest_only else "")
    return Shortfall(
        model=wanted.demand.model,
        reason=reason,
        required_bytes=required,
        available_bytes=available,
        short_by_bytes=required - available if available < required else extra,
        context=wanted.context,
        lanes=wanted.lanes,
        kv_type=wanted.kv_type,
        participants=tuple(_participant(wanted, node) for node in nodes),
        excluded=excluded,
        advice=_advice(wanted, nodes, retry, extra),
        detail=detail,
    )


def _participant(wanted: Wanted, node: NodeInventory) -> Participant:
    footprint = wanted.footprint
    everything = fetch_bytes(footprint, NodeInventory(node=node.node, name="", usable_bytes=0))
    missing = 0 if node.node == wanted.demand.author else fetch_bytes(footprint, node)  # the author has the file
    return Participant(node.node, node.name, node.usable_bytes, everything - missing, missing)


def _node_to_add(wanted: Wanted, nodes: tuple[NodeInventory, ...], retry: Retry, whole: int) -> int:
    """Bytes of the smallest further node that would make the demand fit, in steps; at most the whole model's."""
    demand = msgspec.structs.replace(wanted.demand, context=wanted.context, lanes=wanted.lanes, pins=())
    fits, fails = -(-whole // _STEP_BYTES), 0
    while fits - fails > 1:
        middle = (fits + fails) // 2
        added = NodeInventory(node=NodeId("~"), name="", usable_bytes=middle * _STEP_BYTES)
        largest_first = sorted((*nodes, added), key=lambda node: (-node.usable_bytes, node.node))
        if retry(demand, tuple(largest_first)) is not None:
            fits = middle
        else:
            fails = middle
    return fits * _STEP_BYTES


def _advice(wanted: Wanted, nodes: tuple[NodeInventory, ...], retry: Retry, extra: int) -> str:
    """One line: what would make it fit, the cheapest first."""
    ways = []
    demand = wanted.demand
    if demand.context:
        shorter = retry(msgspec.structs.replace(demand, context=0), nodes)
        if shorter is not None and shorter < demand.context:
            ways.append(f"shorten the context to {shorter} (--context {shorter})")
    smaller = KV_BLOCK_BYTES["q4_0"] < KV_BLOCK_BYTES[wanted.kv_type] and wanted.footprint.kv_type.startswith("q")
    if smaller and retry(msgspec.structs.replace(demand, kv_type="q4_0"), nodes) is not None:
        ways.append("choose a smaller KV type (--kv-type q4_0)")
    ways.append(f"add a node that offers {gigabytes(extra)}")
    text = ", or ".join(ways)
    return text[0].upper() + text[1:] + "."
