"""`plan`: who would run which layers, on the running mesh, on this machine, or on imagined machines."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from rich.console import Console

from meshnode.app.admin import PlanAnswer, PlanRequest
from meshnode.app.cli.control import Control, running_node
from meshnode.app.cli.inquiries import write_json
from meshnode.app.cli.tables import plan_view
from meshnode.app.config import Settings, host_name, parse_size
from meshnode.core.planning import Demand, DeploymentId, Inventory, NodeInventory, Shortfall, make_plan
from meshnode.core.planning.inventory import offered_bytes
from meshnode.identity.ids import NodeId
from meshnode.io.llama.footprint import read_footprint


def plan(model: Path, memories: Sequence[str], flags: Mapping[str, object], as_json: bool) -> int:
    """Show a plan (exit code 0) or the shortfall (1). Starts nothing, writes nothing."""
    settings = Settings.load(flags, os.environ)
    request = PlanRequest(
        footprint=read_footprint(model.expanduser().absolute()),
        context=settings.context,
        # A set value is planned exactly; only the default may give way to what fits.
        lanes=settings.lanes if flags.get("lanes") else 0,
        kv_type=settings.kv_type,
    )
    answer = plan_here(request, memories, settings) if memories else _plan_there_or_here(request, settings)
    if as_json:
        write_json(answer)
    elif answer.plan is not None:
        console = Console(highlight=False)
        console.print(plan_view(answer.plan))
        if request.footprint.whole_only:
            console.print(f"cannot be split: {request.footprint.whole_only}", markup=False, style="yellow")
    elif answer.shortfall is not None:
        Console(highlight=False, stderr=True, soft_wrap=True).print(answer.shortfall.text(), markup=False)
    return 0 if answer.plan is not None else 1


def _plan_there_or_here(request: PlanRequest, settings: Settings) -> PlanAnswer:
    if running_node(settings.data) is not None:
        with Control.of(settings.data) as node:
            return node.plan(request)
    return plan_here(request, (), settings)


def plan_here(request: PlanRequest, memories: Sequence[str], settings: Settings) -> PlanAnswer:
    """A plan for imagined machines of these sizes, or without any for this machine alone."""
    sizes = [parse_size(text) for text in memories]
    named = [(f"machine {number}", size) for number, size in enumerate(sizes, 1)]
    if not named:
        named = [(host_name(), offered_bytes(psutil.virtual_memory().available, settings.memory or None))]
    nodes = tuple(NodeInventory(node=NodeId(name), name=name, usable_bytes=size) for name, size in named)
    demand = Demand(
        deployment=DeploymentId("plan"),
        version=1,
        author=nodes[0].node,
        manifest_digest=request.footprint.manifest_digest,
        model=request.footprint.name,
        context=request.context,
        lanes=request.lanes,
        kv_type=request.kv_type,
    )
    made = make_plan(demand, request.footprint, Inventory(nodes=nodes))
    return PlanAnswer(shortfall=made) if isinstance(made, Shortfall) else PlanAnswer(plan=made)
