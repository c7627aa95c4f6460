"""The planner: demand + footprint + inventory -> plan or shortfall.

Context first: the most comfortable target that any nodes hold decides. For it the fastest placement is chosen
(`choice`), and only then as much context is added as its nodes hold without making tokens slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from meshnode.core.planning.bounded import chain
from meshnode.core.planning.choice import Choice, Chooser
from meshnode.core.planning.context import (
    CELL_GRAIN,
    STAGE_RESERVE_BYTES,
    automatic_targets,
    costs_of,
    layer_kv_bytes,
)
from meshnode.core.planning.cuts import Cuts, cuts_of, pinned_cuts
from meshnode.core.planning.demand import DEFAULT_LANES, check_demand, resolve_kv_type
from meshnode.core.planning.fit import ORDERS_ADVISED, Fit
from meshnode.core.planning.footprint import ModelFootprint
from meshnode.core.planning.inventory import Inventory, NodeInventory
from meshnode.core.planning.lattice import Lattice, Slices
from meshnode.core.planning.pace import Pace, pace_of
from meshnode.core.planning.participants import (
    Exclusion,
    away_with,
    has_file,
    head_of,
    lost_layers,
    missing_bytes,
    participants_of,
    round_trips,
)
from meshnode.core.planning.plan import Plan, StagePlan
from meshnode.core.planning.prediction import prediction_of
from meshnode.core.planning.shortfall import Found as Room
from meshnode.core.planning.shortfall import Shortfall, Wanted, explain
from meshnode.wire.demand import Demand

WIDENING_PERCENT = 5
"""So much slower a token may become for more context than the target: between equally fast nodes layers move freely
towards memory, but they do not move to a slow node for a context that nobody asked for."""

Nodes = tuple[NodeInventory, ...]


@dataclass(frozen=True)
class Placement:
    """Nodes in pipeline order, where each slice ends, and what they have room for."""

    order: tuple[int, ...]
    ends: tuple[int, ...]
    context: int
    lanes: int
    choice: Choice
    pace: Pace

    @property
    def nodes(self) -> Nodes:
        """In pipeline order."""
        return tuple(self.pace.nodes[index] for index in self.order)


def make_plan(demand: Demand, footprint: ModelFootprint, inventory: Inventory) -> Plan | Shortfall:
    """The plan for `demand`, or why there is none.

    Errors: ConfigError, ModelError for options or a model that no mesh could serve; ValueError for a node listed twice.
    """
    check_demand(demand, footprint)
    nodes, excluded = participants_of(demand, footprint, inventory)
    cuts = pinned_cuts(footprint, demand.cuts)
    fits: dict[tuple[int, int, str], Fit] = {}
    search = Search(demand, footprint, inventory, cuts, fits)
    wanted = Wanted(demand, footprint, search.kv_type, search.floor)
    lost = lost_layers(demand, footprint, inventory)
    count = max(1, demand.replicas)
    placements = [] if lost else _placements(search, footprint, nodes, count)
    if len(placements) == count:
        first, *others = (search.plan(placement) for placement in placements)
        return msgspec.structs.replace(first, replicas=tuple(others))
    taken = {node.node for placement in placements for node in placement.nodes}
    left = tuple(node for node in nodes if node.node not in taken)
    busy = tuple(Exclusion(node.node, node.name, node.usable_bytes, "replica") for node in nodes if node.node in taken)

    def room(other: Demand, offered: Nodes) -> int | None:
        return Search(other, footprint, inventory, cuts, fits).room(offered)

    away, rtt_us = (
        away_with(demand, footprint, inventory, lost),
        round_trips(inventory.head or demand.author, inventory),
    )
    return explain(wanted, left, (*busy, *excluded), Room(room, lost, (len(placements), count), rtt_us, away))


def _placements(search: Search, footprint: ModelFootprint, nodes: Nodes, count: int) -> list[Placement]:
    """Up to `count` placements that share no node, all with the same context and lanes.

    Of several replicas, each is one node as long as one holds the model: more streams are what replicas are for. Only
    where that gives too few are pipelines taken as they are for one.
    """
    if count == 1 or search.demand.cuts:
        return _one_after_the_other((search,), nodes, count)
    whole = cuts_of(msgspec.structs.replace(footprint, boundaries=()))
    alone = Search(search.demand, footprint, search.inventory, whole)
    found = _one_after_the_other((alone, search), nodes, count)
    return found if len(found) == count else _one_after_the_other((search,), nodes, count)


def _one_after_the_other(searches: Sequence[Search], nodes: Nodes, count: int) -> list[Placement]:
    """Each by the first search that finds one on the nodes that are left."""
    found: list[tuple[Search, Placement]] = []
    while len(found) < count:
        taken = {node.node for _, placement in found for node in placement.nodes}
        left = tuple(node for node in nodes if node.node not in taken)
        tries = ((search, search.place(left)) for search in searches)
        best = next(((search, placement) for search, placement in tries if placement is not None), None)
        if best is None:
            break
        found.append(best)
    context = min((placement.context for _, placement in found), default=0)
    lanes = min((placement.lanes for _, placement in found), default=0)
    return [search.at(placement, context, lanes) for search, placement in found]


class Search:
    """Looks for placements of one demand, with these slices allowed."""

    def __init__(
        self,
        demand: Demand,
        footprint: ModelFootprint,
        inventory: Inventory,
        cuts: Cuts,
        fits: dict[tuple[int, int, str], Fit] | None = None,
    ) -> None:
        """`fits`: what was found out about the same model and cuts before, by context, lanes and KV type."""
        self.demand = demand
        self.inventory = inventory
        self.kv_type = resolve_kv_type(demand, footprint)
        self._footprint = footprint
        self._cuts = cuts
        self._fits = {} if fits is None else fits
        self._head = head_of(demand, inventory)
        self._targets = (demand.context,) if demand.context else automatic_targets(footprint)

    @property
    def floor(self) -> int:
        """The smallest context that would be accepted."""
        return self._targets[-1]

    @property
    def _lanes(self) -> tuple[int, ...]:
        if self.demand.lanes:
            return (self.demand.lanes,)
        if any(layer.state_bytes for layer in self._footprint.layers):
            return tuple(range(DEFAULT_LANES, 0, -1))
        return (DEFAULT_LANES,)

    def place(self, nodes: Nodes) -> Placement | None:
        """The best placement on `nodes` (sorted: largest memory first, then lower id), or None."""
        for target in self._targets if nodes else ():
            pace = pace_of(self._footprint, target, self.kv_type, nodes, (self._head, self.inventory.links))
            for lanes in self._lanes:
                fit = self._fit(target, lanes)
                choice = Chooser(self._footprint, fit, pace, has_file(self.demand, self.inventory)).choose()
                if choice is not None:
                    found = choice.found
                    return self._widened(Placement(found.order, found.ends, target, lanes, choice, pace))
        return None

    def room(self, nodes: Nodes) -> int | None:
        """The context of some placement that these nodes hold, whatever its speed; None: they hold none."""
        rooms = [node.usable_bytes for node in nodes]
        for target in self._targets:
            for lanes in self._lanes:
                order = self._fit(target, lanes).fewest(rooms, ORDERS_ADVISED)
                if order is not None:
                    return self._roomiest(target, lanes, [rooms[index] for index in order])
        return None

    def _roomiest(self, target: int, lanes: int, rooms: list[int]) -> int:
        return self._most(target, lambda context: self._fit(context, lanes).holds(rooms))

    def at(self, placement: Placement, context: int, lanes: int) -> Placement:
        """The same nodes with less context or fewer lanes."""
        if (context, lanes) == (placement.context, placement.lanes):
            return placement
        found = self._cut(placement, context, lanes).best()
        assert found is not None, "what holds more holds less"
        return Placement(found.order, found.ends, context, lanes, placement.choice, placement.pace)

    def _fit(self, context: int, lanes: int) -> Fit:
        key = context, lanes, self.kv_type
        known = self._fits.get(key)
        if known is None:
            costs = costs_of(self._footprint, context, lanes, self.kv_type)
            known = self._fits[key] = Fit(self._cuts, costs)
        return known

    def _cut(self, placement: Placement, context: int, lanes: int) -> Lattice:
        """All ways to cut the model over the nodes of `placement` in their order."""
        pace = placement.pace
        missing = [missing_bytes(self._footprint, node) for node in pace.nodes]
        slices = Slices(self._cuts, self._fit(context, lanes).costs, pace, missing)
        return Lattice(slices, chain(slices, placement.order), range(len(pace.nodes)))

    def _widened(self, placement: Placement) -> Placement:
        """In automatic mode: the largest context that these nodes hold in this order, at about the same speed."""
        if self.demand.context:
            return placement
        slowest = placement.choice.found.time * (100 + WIDENING_PERCENT) // 100
        rooms = [node.usable_bytes for node in placement.nodes]

        def holds(context: int) -> bool:
            if not self._fit(context, placement.lanes).holds(rooms):
                return False
            return self._cut(placement, context, placement.lanes).least_time() <= slowest

        return self.at(placement, self._most(placement.context, holds), placement.lanes)

    def _most(self, least: int, holds: Callable[[int], bool]) -> int:
        """The largest context that `holds`, in whole cell grains; `least` is known to."""
        trained = self._footprint.context_trained
        if self.demand.context or holds(trained):
            return self.demand.context or trained
        fits, fails = least // CELL_GRAIN, -(-trained // CELL_GRAIN)
        while fails - fits > 1:
            middle = (fits + fails) // 2
            if holds(middle * CELL_GRAIN):
                fits = middle
            else:
                fails = middle
        return max(least, fits * CELL_GRAIN)

    def plan(self, placement: Placement) -> Plan:
        """The plan of a placement."""
        demand = self.demand
        starts = (0, *placement.ends[:-1])
        stages = tuple(
            self._stage(node, first, last, placement)
            for node, first, last in zip(placement.nodes, starts, placement.ends, strict=True)
        )
        return Plan(
            deployment=demand.deployment,
            demand_version=demand.version,
            manifest_digest=demand.manifest_digest,
            model=demand.model,
            coordinator=self._head or stages[0].node,
            stages=stages,
            context=placement.context,
            lanes=placement.lanes,
            kv_type=self.kv_type,
            flash_attention=self._footprint.flash_attention,
            prediction=prediction_of(placement.pace, placement.order, placement.ends, placement.choice.single),
        )

    def _stage(self, node: NodeInventory, first: int, last: int, placement: Placement) -> StagePlan:
        footprint = self._footprint
        count = len(footprint.layers)
        caches = layer_kv_bytes(footprint, placement.context, self.kv_type)
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
