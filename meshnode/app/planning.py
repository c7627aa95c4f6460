"""What would be planned: one answer for the running node's route and for the command line without a node."""

from __future__ import annotations

import msgspec

from meshnode.app.admin import PlanAnswer, PlanRequest
from meshnode.core.planning import Demand, DeploymentId, Inventory, Plan, Shortfall, make_plan
from meshnode.errors import ConfigError
from meshnode.identity.ids import NodeId

DEPLOYMENT = DeploymentId("plan")
"""No deployment: nothing is loaded, and no plan depends on the name."""


def answer(request: PlanRequest, inventory: Inventory, author: NodeId) -> PlanAnswer:
    """The plan or shortfall for `request`, were `author` to serve the model. Errors: ConfigError, ModelError."""
    demand = Demand(
        deployment=DEPLOYMENT,
        version=1,
        author=author,
        manifest_digest=request.footprint.manifest_digest,
        model=request.footprint.name,
        context=request.context,
        lanes=request.lanes,
        kv_type=request.kv_type,
        pins=nodes_called(inventory, request.only),
        excludes=nodes_called(inventory, request.exclude),
        cuts=request.cuts,
        replicas=request.replicas,
    )
    made = make_plan(demand, request.footprint, inventory)
    if isinstance(made, Shortfall):
        return PlanAnswer(shortfall=made)
    return PlanAnswer(plan=_compared(made, demand, request, inventory))


def _compared(made: Plan, demand: Demand, request: PlanRequest, inventory: Inventory) -> Plan:
    """With the best single node also where a person's cuts left none to compare with."""
    if not demand.cuts or made.prediction is None:
        return made
    free = msgspec.structs.replace(demand, cuts=(), context=made.context, lanes=made.lanes)
    other = make_plan(free, request.footprint, inventory)
    if isinstance(other, Shortfall) or other.prediction is None:
        return made
    return msgspec.structs.replace(
        made, prediction=msgspec.structs.replace(made.prediction, single=other.prediction.single)
    )


def nodes_called(inventory: Inventory, names: tuple[str, ...]) -> tuple[NodeId, ...]:
    """The nodes with these whole ids or names. Errors: ConfigError for a name that nobody has."""
    found: list[NodeId] = []
    for name in names:
        those = [node.node for node in inventory.nodes if name in (node.node, node.name)]
        if not those:
            known = ", ".join(sorted(node.name for node in inventory.nodes))
            raise ConfigError(f"no machine is called {name!r}", f"There are: {known}.")
        found += those
    return tuple(found)
