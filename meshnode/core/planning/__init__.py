"""Who runs which layers: a pure function from demand, footprint and inventory to a plan or a typed shortfall.

Invariant: same input, in any order, gives the same plan, byte for byte, on every machine. Integers only, no clock,
no chance.
"""

from meshnode.core.planning.footprint import LayerFootprint, ModelFootprint
from meshnode.core.planning.inventory import Inventory, NodeInventory
from meshnode.core.planning.plan import Plan, StagePlan
from meshnode.core.planning.planner import make_plan
from meshnode.core.planning.shortfall import Shortfall
from meshnode.wire.demand import Demand, DeploymentId

__all__ = [
    "Demand",
    "DeploymentId",
    "Inventory",
    "LayerFootprint",
    "ModelFootprint",
    "NodeInventory",
    "Plan",
    "Shortfall",
    "StagePlan",
    "make_plan",
]
