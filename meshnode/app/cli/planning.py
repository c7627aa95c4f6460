"""`plan`: who would run which layers, on the running mesh, on this machine, or on imagined machines."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from meshnode.app.admin import PlanAnswer, PlanRequest
from meshnode.app.cli.control import Control, running_node
from meshnode.app.cli.inquiries import write_json
from meshnode.app.cli.plans import plan_view
from meshnode.app.cli.what_if import read_what_if
from meshnode.app.config import Settings, host_name, parse_size
from meshnode.app.planning import answer
from meshnode.core.planning import Inventory, NodeInventory
from meshnode.core.planning.inventory import offered_bytes
from meshnode.errors import ConfigError
from meshnode.identity.ids import NodeId
from meshnode.io.llama.footprint import read_footprint


@dataclass(frozen=True)
class Imagined:
    """Machines to plan for instead of the real ones: one for each size, or those of a file."""

    memories: Sequence[str] = ()
    what_if: Path | None = None


def plan(model: Path, imagined: Imagined, flags: Mapping[str, object], as_json: bool, replicas: int = 0) -> int:
    """Show a plan (exit code 0) or the shortfall (1). Starts nothing, writes nothing."""
    settings = Settings.load(flags, os.environ)
    if imagined.memories and imagined.what_if is not None:
        raise ConfigError("--memory and --what-if both imagine machines", "Write the machines of --memory in the file.")
    request = PlanRequest(
        footprint=read_footprint(model.expanduser().absolute()),
        context=settings.context,
        # A set value is planned exactly; only the default may give way to what fits.
        lanes=settings.lanes if flags.get("lanes") else 0,
        kv_type=settings.kv_type,
        only=settings.only,
        exclude=settings.exclude,
        cuts=settings.cuts,
        replicas=replicas,
    )
    if imagined.what_if is not None:
        made = answer(request, *read_what_if(imagined.what_if))
    elif imagined.memories:
        made = plan_here(request, imagined.memories, settings)
    else:
        made = _plan_there_or_here(request, settings)
    _show(made, request, as_json)
    return 0 if made.plan is not None else 1


def _show(made: PlanAnswer, request: PlanRequest, as_json: bool) -> None:
    if as_json:
        write_json(made)
    elif made.plan is not None:
        console = Console(highlight=False)
        console.print(plan_view(made.plan))
        if request.footprint.whole_only:
            console.print(f"cannot be split: {request.footprint.whole_only}", markup=False, style="yellow")
    elif made.shortfall is not None:
        Console(highlight=False, stderr=True, soft_wrap=True).print(made.shortfall.text(), markup=False)


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
    return answer(request, Inventory(nodes=nodes), nodes[0].node)
