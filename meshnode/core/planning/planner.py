"""The planner: demand + footprint + inventory -> plan or shortfall.

One node if it fits; otherwise the fewest nodes. For k nodes the k largest decide whether k can do it at all: in any
split that fits, a larger node can stand in for a smaller one. So no subset is ever enumerated.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshnode.core.planning.context import (
    CELL_GRAIN,
    STAGE_RESERVE_BYTES,
    automatic_targets,
    costs_of,
    layer_kv_bytes,
)
from meshnode.core.planning.cuts import Cuts, cuts_of
from meshnode.core.planning.demand import DEFAULT_LANES, Demand, check_demand, resolve_kv_type
from meshnode.core.planning.footprint import ModelFootprint
from meshnode.core.planning.inventory import Inventory, NodeInventory
from meshnode.core.planning.participants import fetch_bytes, participants_of
from meshnode.core.planning.partition import Fit, partition
from meshnode.core.planning.plan import Plan, StagePlan
from meshnode.core.planning.shortfall import Shortfall, Wanted, explain
from meshnode.wire.limits import STAGES


@dataclass(frozen=True)
class Placement:
    """Nodes in pipeline order that hold the model with this context and these lanes."""

    nodes: tuple[NodeInventory, ...]
    context: int
    lanes: int

    @property
    def rooms(self) -> tuple[int, ...]:
        """Usable bytes in pipeline order."""
        return tuple(node.usable_bytes for node in self.nodes)


def make_plan(demand: Demand, footprint: ModelFootprint, inventory: Inventory) -> Plan | Shortfall:
    """The plan for `demand`, or why there is none.

    Errors: ConfigError, ModelError for options or a model that no mesh could serve; ValueError for a node listed twice.
    """
    check_demand(demand, footprint)
    kv_type = resolve_kv_type(demand, footprint)
    nodes, excluded = participants_of(demand, footprint, inventory)
    search = Search(demand, footprint)
    placement = search.place(nodes)
    if placement is not None:
        return search.plan(placement, nodes)

    def retry(other: Demand, others: tuple[NodeInventory, ...]) -> int | None:
        found = Search(other, footprint).place(others)
        return None if found is None else found.context

    return explain(Wanted(demand, footprint, kv_type, search.floor), nodes, excluded, retry)


class Search:
    """Looks for a placement of one demand."""

    def __init__(self, demand: Demand, footprint: ModelFootprint) -> None:
        self._demand = demand
        self._footprint = footprint
        self._kv_type = resolve_kv_type(demand, footprint)
        self._cuts: Cuts = cuts_of(footprint)
        self._targets = (demand.context,) if demand.context else automatic_targets(footprint)

    @property
    def floor(self) -> int:
        """The smallest context that would have been accepted."""
        return self._targets[-1]

    @property
    def _lanes(self) -> tuple[int, ...]:
        if self._demand.lanes:
            return (self._demand.lanes,)
        if any(layer.state_bytes for layer in self._footprint.layers):
            return tuple(range(DEFAULT_LANES, 0, -1))
        return (DEFAULT_LANES,)

    def place(self, nodes: tuple[NodeInventory, ...]) -> Placement | None:
        """The best placement on `nodes` (sorted: largest memory first, then lower id), or None."""
        for target in self._targets:
            for lanes in self._lanes:
                chosen = self._place_at(nodes, target, lanes)
                if chosen is not None:
                    return self._widened(Placement(chosen, target, lanes))
        return None

    def _fit(self, context: int, lanes: int) -> Fit:
        return Fit(self._cuts, costs_of(self._footprint, context, lanes, self._kv_type))

    def _place_at(self, nodes: tuple[NodeInventory, ...], context: int, lanes: int) -> tuple[NodeInventory, ...] | None:
        author = self._demand.author
        fit = self._fit(context, lanes)
        single = sorted(
            (node for node in nodes if fit.whole_bytes <= node.usable_bytes),
            key=lambda node: (node.node != author, fetch_bytes(self._footprint, node), -node.usable_bytes, node.node),
        )
        if single:
            return (single[0],)
        for count in range(2, min(len(nodes), self._cuts.stages_max, STAGES) + 1):
            largest = nodes[:count]
            order = fit.find_order([node.usable_bytes for node in largest])
            if order is None:
                continue
            found = tuple(largest[index] for index in order)
            return self._with_author(fit, nodes, count) or found
        return None

    def _with_author(self, fit: Fit, nodes: tuple[NodeInventory, ...], count: int) -> tuple[NodeInventory, ...] | None:
        """The same number of nodes with the file's holder among them, at the front if it can be, then by memory: its
        slice needs no fetching, and prompts enter where the head is. Where it offers no room: by memory."""
        holder = [node for node in nodes if node.node == self._demand.author]
        others = [node for node in nodes if node.node != self._demand.author]
        preferred = (*holder, *others[: count - len(holder)])
        if fit.holds([node.usable_bytes for node in preferred]):
            return preferred
        order = fit.find_order([node.usable_bytes for node in preferred])
        if order is not None:
            return tuple(preferred[index] for index in order)
        largest = nodes[:count]
        return largest if fit.holds([node.usable_bytes for node in largest]) else None

    def _widened(self, placement: Placement) -> Placement:
        """In automatic mode: the largest context that these nodes hold in this order, in whole cell grains."""
        if self._demand.context:
            return placement
        trained = self._footprint.context_trained
        if self._fit(trained, placement.lanes).holds(placement.rooms):
            return Placement(placement.nodes, trained, placement.lanes)
        fits, fails = placement.context // CELL_GRAIN, -(-trained // CELL_GRAIN)
        while fails - fits > 1:
            middle = (fits + fails) // 2
            if self._fit(middle * CELL_GRAIN, placement.lanes).holds(placement.rooms):
                fits = middle
            else:
                fails = middle
        return Placement(placement.nodes, max(placement.context, fits * CELL_GRAIN), placement.lanes)

    def plan(self, placement: Placement, nodes: tuple[NodeInventory, ...]) -> Plan:
        """The plan of a placement that `place` found among `nodes`."""
        demand = self._demand
        costs = costs_of(self._footprint, placement.context, placement.lanes, self._kv_type)
        ends = partition(self._cuts, costs, placement.rooms)
        assert ends is not None, "a placement holds by construction"
        starts = (0, *ends[:-1])
        stages = tuple(
            self._stage(node, first, last, placement)
            for node, first, last in zip(placement.nodes, starts, ends, strict=True)
        )
        present = any(node.node == demand.author for node in nodes)
        return Plan(
            deployment=demand.deployment,
            demand_version=demand.version,
            manifest_digest=demand.manifest_digest,
            model=demand.model,
            coordinator=demand.author if present else stages[0].node,
            stages=stages,
            context=placement.context,
            lanes=placement.lanes,
            kv_type=self._kv_type,
            flash_attention=self._footprint.flash_attention,
        )

    def _stage(self, node: NodeInventory, first: int, last: int, placement: Placement) -> StagePlan:
        footprint = self._footprint
        count = len(footprint.layers)
        caches = layer_kv_bytes(footprint, placement.context, self._kv_type)
        layers = footprint.layers[first:last]
        whole = (first, last) == (0, count)
        return StagePlan(
            node=node.node,
            name=node.name,
            first=first,
            last=last,
            weight_bytes=sum(layer.weight_bytes for layer in layers) + footprint.shared_bytes,
            kv_bytes=sum(caches[first:last]),
            state_bytes=sum(layer.state_bytes for layer in layers) * placement.lanes,
            embedding_bytes=footprint.embedding_bytes if first == 0 and not (whole and footprint.tied) else 0,
            output_bytes=footprint.output_bytes if last == count else 0,
            reserve_bytes=STAGE_RESERVE_BYTES,
            usable_bytes=node.usable_bytes,
            threads=node.cores,
        )
