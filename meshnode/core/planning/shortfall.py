"""The planner's honest no: how much memory is needed, how much there is, and what to do about it.

Invariant: made after the search and from its result; what it reports never changes what is planned. Decimal GB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from meshnode.core.planning.context import Costs, costs_of
from meshnode.core.planning.demand import DEFAULT_LANES
from meshnode.core.planning.footprint import KV_BLOCK_BYTES, ModelFootprint
from meshnode.core.planning.inventory import NodeInventory
from meshnode.core.planning.participants import REASONS, Exclusion, fetch_bytes
from meshnode.identity.ids import NodeId
from meshnode.wire.demand import Demand

_NOT_MEMORY = {
    "artifacts": "Start the node that has the file, or `meshnode serve` the same file on another.",
    "links": "Let every node reach the others (`meshnode ping`), or choose some that do with --only.",
}
"""What to do where more memory would not help."""

MACHINES = 4
"""Named of those that have missing layers: who reads it switches on one or two."""

_STEP_BYTES = 10_000_000
"""A node to add is advised in steps of 0.01 GB."""

Retry = Callable[[Demand, tuple[NodeInventory, ...]], int | None]
"""Plan another demand on other nodes: the context it would get, or None."""


@dataclass(frozen=True)
class Found:
    """What the search came to know."""

    retry: Retry
    lost_layers: tuple[int, ...] = ()
    """Nobody has them who can be reached."""
    replicas: tuple[int, int] = (0, 1)
    """Placed, and asked for."""
    rtt_us: Mapping[NodeId, int] = field(default_factory=dict)
    """Of nodes, from the author."""
    away: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Who is away and has some of those layers, by name; who has most first."""


class Participant(msgspec.Struct, frozen=True):
    """A node that would have taken layers."""

    node: NodeId
    name: str
    usable_bytes: int
    cached_bytes: int
    missing_bytes: int
    """What it would have to fetch, were it to hold the whole model."""
    rtt_us: int = 0
    """From the author and back; 0: not measured, or the author itself."""


class Shortfall(msgspec.Struct, frozen=True):
    """Why there is no plan."""

    model: str
    reason: str
    """no_nodes | memory | cuts (enough in all, but no allowed cut fits) | whole (must stay on one node) |
    links (enough, but nodes do not reach each other) | artifacts (nobody has some layers) | replicas (fewer fit)"""
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
    """Why the model cannot be split (`whole`), which layers (`artifacts`), how many of how many (`replicas`)."""

    def lines(self) -> tuple[str, ...]:
        """For people: the numbers, one line per node, the advice."""
        count = len(self.participants)
        head = (
            f"{self.model} with a context of {self.context} tokens ({self.kv_type}) "
            f"needs {gigabytes(self.required_bytes)}, "
            f"available over {count} node{'' if count == 1 else 's'}: {gigabytes(self.available_bytes)}"
            + (f", short by {gigabytes(self.short_by_bytes)}" if self.short_by_bytes else "")
        )
        explanations = {
            "cuts": "It would be enough in all, but no cut that this architecture allows fits these nodes.",
            "whole": f"This model must stay on one node: {self.detail}.",
            "links": "It would be enough in all, but nodes that could hold it do not reach each other.",
            "artifacts": f"The node that has the file is away, and nobody else has these of its layers: {self.detail}.",
            "replicas": f"Of the replicas that were asked for {self.detail} fit; the numbers are for one more.",
        }
        taking = (
            f"{item.name}: offers {gigabytes(item.usable_bytes)}, has {gigabytes(item.cached_bytes)} of the model, "
            f"lacks {gigabytes(item.missing_bytes)}" + (f", {item.rtt_us / 1000:.1f} ms away" if item.rtt_us else "")
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

    @property
    def largest_only(self) -> bool:
        """Whether one node must hold it all."""
        return bool(self.footprint.whole_only) or not self.footprint.boundaries

    def costs(self) -> Costs:
        """Prices at the context that was wanted."""
        return costs_of(self.footprint, self.context, self.lanes, self.kv_type)


def gigabytes(count: int) -> str:
    """Decimal GB with two digits; below one GB in MB, rounded up: something is never shown as nothing."""
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{-(-count // 100_000) / 10:.1f} MB"


def explain(
    wanted: Wanted, nodes: tuple[NodeInventory, ...], excluded: tuple[Exclusion, ...], found: Found
) -> Shortfall:
    """The shortfall of a demand that found no placement on `nodes`."""
    costs = wanted.costs()
    whole = costs.need(0, costs.layers)
    rooms = [node.usable_bytes for node in nodes]
    counted = 1 if wanted.largest_only else max(1, len(nodes))
    required = whole + costs.each * (counted - 1)
    available = max(rooms, default=0) if wanted.largest_only else sum(rooms)
    reason = _reason(wanted, nodes, found, enough=available >= required)
    if reason in _NOT_MEMORY:
        short, advice = 0, _switch_on(found) if reason == "artifacts" and found.away else _NOT_MEMORY[reason]
    else:
        extra = _node_to_add(wanted, nodes, found.retry, whole)
        short = required - available if available < required else extra
        advice = _advice(wanted, nodes, found.retry, extra)
    return Shortfall(
        model=wanted.demand.model,
        reason=reason,
        required_bytes=required,
        available_bytes=available,
        short_by_bytes=short,
        context=wanted.context,
        lanes=wanted.lanes,
        kv_type=wanted.kv_type,
        participants=tuple(_participant(wanted, node, found.rtt_us.get(node.node, 0)) for node in nodes),
        excluded=excluded,
        advice=advice,
        detail=_detail(wanted, reason, found),
    )


def _reason(wanted: Wanted, nodes: tuple[NodeInventory, ...], found: Found, *, enough: bool) -> str:
    if found.replicas[0]:
        return "replicas"
    if not nodes:
        return "no_nodes"
    if found.lost_layers:
        return "artifacts"
    if found.retry(wanted.demand, nodes) is not None:
        return "links"
    if wanted.largest_only:
        return "whole"
    return "cuts" if enough else "memory"


def _detail(wanted: Wanted, reason: str, found: Found) -> str:
    if reason == "artifacts":
        return _ranges(found.lost_layers)
    if reason == "replicas":
        return f"{found.replicas[0]} of {found.replicas[1]}"
    if wanted.largest_only:
        return wanted.footprint.whole_only or "its architecture allows no cut"
    return ""


def _switch_on(found: Found) -> str:
    """Which machines have what is missing, by what they said while they were here."""
    machines = (
        f"{name}, which has {'all of them' if layers == found.lost_layers else _ranges(layers)}"
        for name, layers in found.away[:MACHINES]
    )
    return f"Switch on {'; or '.join(machines)}; or `meshnode serve` the same file on another."


def _ranges(layers: Sequence[int]) -> str:
    """ "0-5, 8, 10-11": ascending numbers in runs."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _participant(wanted: Wanted, node: NodeInventory, rtt_us: int) -> Participant:
    footprint = wanted.footprint
    everything = fetch_bytes(footprint, NodeInventory(node=node.node, name="", usable_bytes=0))
    missing = 0 if node.node == wanted.demand.author else fetch_bytes(footprint, node)  # the author has the file
    return Participant(node.node, node.name, node.usable_bytes, everything - missing, missing, rtt_us)


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
