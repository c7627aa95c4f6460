"""What a placement is predicted to take, for people and for the comparison of plans. Decides nothing itself."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from meshnode.core.planning.footprint import ModelFootprint
from meshnode.core.planning.inventory import Inventory
from meshnode.core.planning.lattice import Found
from meshnode.core.planning.pace import NEVER, Pace, chunk_us, pace_of
from meshnode.core.planning.plan import Plan, Prediction, Single, StageTime


def prediction_of(pace: Pace, order: Sequence[int], ends: Sequence[int], single: Found | None = None) -> Prediction:
    """The parts of `pace.total`; the sum of the parts, each rounded down, is the total."""
    starts = (0, *ends[:-1])
    stages = []
    for place, (node, first, last) in enumerate(zip(order, starts, ends, strict=True)):
        known = pace.nodes[node]
        wire = pace.hop(order[place - 1], node) if place else pace.enter(node)
        stages.append(
            StageTime(
                compute_us=pace.microseconds(pace.stage(node, first, last)),
                wire_us=pace.microseconds(wire),
                chunk_us=chunk_us(known, pace.read(first, last)),
                measured=known.decode_bytes_per_s > 0,
            )
        )
    compute, wire = sum(stage.compute_us for stage in stages), sum(stage.wire_us for stage in stages)
    back = pace.microseconds(pace.back(order[-1], order[0]))
    alone = None
    if single is not None:
        best = pace.nodes[single.order[0]]
        alone = Single(best.node, best.name, pace.microseconds(single.time))
    return Prediction(compute + wire + back, compute, wire, back, tuple(stages), alone)


def predicted(plan: Plan, footprint: ModelFootprint, inventory: Inventory) -> Plan | None:
    """`plan` with times of today's inventory; None where one of its nodes is gone or a hop is not possible any more.

    Two plans are compared only when both were predicted from one inventory.
    """
    present = {node.node: node for node in inventory.nodes}
    if not {*plan.nodes, plan.coordinator} <= present.keys():
        return None
    nodes = [present[node] for node in plan.nodes]
    pace = pace_of(footprint, plan.context, plan.kv_type, nodes, (plan.coordinator, inventory.links))
    order, ends = range(len(nodes)), [stage.last for stage in plan.stages]
    if pace.total(order, ends) >= NEVER:
        return None
    return msgspec.structs.replace(plan, prediction=prediction_of(pace, order, ends))
