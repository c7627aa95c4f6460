"""`/api/models`, `/api/drain` and `/api/cutover` of a running node (types in app.admin)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
from starlette.requests import Request
from starlette.routing import Route

from meshnode.app.admin import (
    Cutover,
    CutoverAnswer,
    CutoverRequest,
    DrainRequest,
    LoadAnswer,
    LoadRequest,
    UnloadAnswer,
    UnloadRequest,
)
from meshnode.app.models import Models, Wanted
from meshnode.core.node.deployments import Deployment
from meshnode.core.node.events import DrainWanted, Event
from meshnode.core.node.mediator import Mediator
from meshnode.core.planning.hysteresis import better
from meshnode.core.planning.plan import Plan
from meshnode.core.planning.planner import make_plan
from meshnode.core.planning.prediction import predicted
from meshnode.errors import ConfigError
from meshnode.identity.ids import NodeId
from meshnode.io.http.access import admin_route
from meshnode.io.http.body import decode, read_body


class ModelRoutes:
    """What the command line wants done with models and machines."""

    def __init__(self, mediator: Mediator, models: Models, post: Callable[[Event], Awaitable[None]]) -> None:
        self._mediator = mediator
        self._models = models
        self._post = post

    def routes(self, token: str) -> list[Route]:
        """All routes, each behind the token."""
        table: list[tuple[str, Callable[[Request], Awaitable[object]]]] = [
            ("/api/models", self.load),
            ("/api/models/unload", self.unload),
            ("/api/drain", self.drain),
            ("/api/cutover", self.cutover),
        ]
        return [admin_route(path, ["POST"], token, handler) for path, handler in table]

    async def load(self, request: Request) -> LoadAnswer:
        """POST /api/models."""
        asked = decode(await read_body(request), LoadRequest)
        path = Path(asked.path)
        if not path.is_absolute():
            raise ConfigError(f"{asked.path!r} is not a whole path", "Give the path from the root of the file system.")
        wanted = Wanted(
            path,
            context=asked.context,
            lanes=asked.lanes,
            kv_type=asked.kv_type,
            only=asked.only,
            exclude=asked.exclude,
            cuts=asked.cuts,
            replicas=asked.replicas,
        )
        return LoadAnswer(await self._models.load(wanted))

    async def unload(self, request: Request) -> UnloadAnswer:
        """POST /api/models/unload."""
        asked = decode(await read_body(request), UnloadRequest)
        return UnloadAnswer(asked.model, await self._models.unload(asked.model))

    async def drain(self, request: Request) -> None:
        """POST /api/drain."""
        asked = decode(await read_body(request), DrainRequest)
        node = NodeId(asked.node)
        if node != self._mediator.node and not self._mediator.reachable(node):
            raise ConfigError("that is no member this node has a link to", "`meshnode peers` lists them")
        await self._post(DrainWanted(node, asked.draining))

    async def cutover(self, request: Request) -> CutoverAnswer:
        """POST /api/cutover: compare what runs with what would be planned; change nothing."""
        asked = decode(await read_body(request) or b"{}", CutoverRequest)
        found = [each for each in self._mediator.deployments.values() if asked.model in ("", each.demand.model)]
        if asked.model and not found:
            raise ConfigError(f"{asked.model!r} is no model of this node", "`meshnode status` lists what is served.")
        return CutoverAnswer(tuple([await self._compare(deployment) for deployment in found]))

    async def _compare(self, deployment: Deployment) -> Cutover:
        demand, footprint = deployment.demand, deployment.footprint
        inventory = self._mediator.inventory(demand.deployment, footprint.weight_kind)
        made = await trio.to_thread.run_sync(make_plan, demand, footprint, inventory)
        plan = deployment.plan
        present = None if plan is None else predicted(plan, footprint, inventory)
        if not isinstance(made, Plan):
            return Cutover(demand.deployment, demand.model, "impossible", present, shortfall=made)
        return Cutover(demand.deployment, demand.model, _verdict(plan, present, made), present, made)


def _verdict(plan: Plan | None, present: Plan | None, candidate: Plan) -> str:
    if plan is None:
        return "none"
    if _placement(plan) == _placement(candidate):
        return "keep"
    return "replace" if present is None or better(present, candidate) else "stay"


def _placement(plan: Plan) -> tuple[object, ...]:
    """What a cut-over would change. A plan's digest also tells what its nodes offered when it was made."""
    stages = tuple((stage.node, stage.first, stage.last) for stage in plan.stages)
    return stages, plan.context, plan.lanes, plan.kv_type
