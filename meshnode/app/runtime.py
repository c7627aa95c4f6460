"""The runtime: hands events to the mediator one by one and executes its effects in their order.

Invariant: effects of one event are begun before the next event is looked at, and a Persist is durable before anything
behind it that rests on it (effects.Resting) is begun. Time enters the core here and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, assert_never

import trio

from meshnode.core.coordination.orders import Hops
from meshnode.core.node import effects as do
from meshnode.core.node.events import (
    Event,
    HeadFailed,
    ModelNotOpened,
    PlanFailed,
    Planned,
    Received,
    StageReported,
    TimePassed,
)
from meshnode.core.node.left_out import in_place_of
from meshnode.core.node.mediator import Mediator
from meshnode.core.planning.planner import make_plan
from meshnode.errors import MeshError
from meshnode.identity.ids import NodeId
from meshnode.wire.demand import Demand
from meshnode.wire.fence import Fence
from meshnode.wire.messages import AnyMessage, Claim, Failed, Prepare

log = logging.getLogger("meshnode.node")

EVENTS = 256
"""Events waiting: every producer waits for room, so a burst slows its source and nothing else."""
LONGEST_SLEEP_S = 1.0
"""A machine that was suspended notices within this time."""
REWRITE_S = 1.0
"""Between attempts at a write that failed: as often as the loop turns by itself."""
EXECUTED_S = 1.0
"""A disk that hangs for longer is itself something that a status has to show."""

BUG = "an internal error; this node's log says more"


HeadEffect = do.OpenHead | do.ServeHead | do.DrainHead | do.CloseHead


class Links(Protocol):
    """What the runtime needs of app.control."""

    def send(self, peer: NodeId, message: AnyMessage) -> None:
        """Queue a message."""

    def close(self, peer: NodeId, reason: str) -> None:
        """End a link."""

    async def dial(self, node: NodeId, addresses: tuple[str, ...]) -> None:
        """Dial and serve a link until it ends."""


class Stages(Protocol):
    """What the runtime needs of app.stages."""

    def expect(self, order: Prepare, reserved_bytes: int) -> bool:
        """Make room for a stage that `stop` can end from now on; False when it is under way already."""

    async def prepare(self, order: Prepare) -> None:
        """Fetch, start, load an expected stage; reports by itself."""

    async def connect(self, fence: Fence) -> None:
        """Dial the downstream of the stages of `fence`; reports by itself."""

    def stop(self, fence: Fence, kept: tuple[do.Kept, ...]) -> None:
        """End the stages of `fence`, but those that are kept for another run."""

    async def renew(self, fence: Fence) -> None:
        """The stages of `fence` may go on."""


class Models(Protocol):
    """What the runtime needs of app.models."""

    async def open(self, demand: Demand) -> None:
        """Open what a head of this model needs; reports by itself."""


class Heads(Protocol):
    """What the runtime needs of app.heads."""

    def expect(self, claim: Claim, hops: Hops) -> None:
        """Listen for the last stage's connection, before any stage is told to dial."""

    async def open(self, claim: Claim, hops: Hops, created: int) -> None:
        """Connect and probe, then serve until the head ends; reports by itself."""

    def serve(self, fence: Fence) -> None:
        """Requests go to the head of `fence` from now on."""

    def drain(self, fence: Fence) -> None:
        """Let what streams through the head of `fence` finish; reports by itself."""

    def close(self, fence: Fence) -> None:
        """End the head of `fence`."""


async def ends_by_bug(act: Callable[..., Awaitable[None]], *arguments: object) -> bool:
    """Run `act`; True when a bug of ours ended it, which is logged and not worth the node.

    MeshError and OSError are no bugs: they are raised.
    """
    try:
        await act(*arguments)
    except (MeshError, OSError):
        raise
    except Exception:  # the one broad except (STYLE)
        log.exception("%s failed", getattr(act, "__qualname__", "an effect"))
        return True
    return False


@dataclass(frozen=True)
class Disk:
    """Writes that are durable when they return."""

    ledger: Callable[[bytes], None]
    revocations: Callable[[bytes], None]
    demands: Callable[[bytes], None]

    def write(self, effect: do.Write) -> None:
        """Carry out one of these effects."""
        match effect:
            case do.Persist():
                self.ledger(effect.ledger)
            case do.KeepRevocations():
                self.revocations(effect.lists)
            case do.KeepDemands():
                self.demands(effect.demands)
            case _:
                assert_never(effect)


class Runtime:
    """One mediator and the world around it. `attach` the parts before `run`."""

    def __init__(self, mediator: Mediator, disk: Disk) -> None:
        self.mediator = mediator
        self._disk = disk
        self._into, self._events = trio.open_memory_channel[Event](EVENTS)
        self._links: Links | None = None
        self._stages: Stages | None = None
        self._heads: Heads | None = None
        self._models: Models | None = None
        self._changed = trio.Event()
        self._executing = False
        self.sick = ""
        """Why nothing can be promised at present, for people; empty: the data directory can be written."""
        self._unwritten: dict[type[do.Write], do.Write] = {}
        """The last of each kind that could not be written."""
        self._rewrite_at = 0.0

    def attach(self, links: Links, stages: Stages, heads: Heads, models: Models) -> None:
        """The parts that effects are executed on."""
        self._links, self._stages, self._heads, self._models = links, stages, heads, models

    async def post(self, event: Event) -> None:
        """Hand in an event; waits for room. Of no effect once `run` has ended."""
        try:
            await self._into.send(event)
        except trio.BrokenResourceError:
            log.debug("%s came when the node had ended", type(event).__name__)

    def hint(self, event: Event) -> None:
        """Hand in an event that may be lost: a later one of its kind replaces it."""
        try:
            self._into.send_nowait(event)
        except (trio.WouldBlock, trio.BrokenResourceError):
            pass

    async def changed(self) -> None:
        """Wait until any event has been handled."""
        await self._changed.wait()

    async def executed(self) -> None:
        """Wait until the effects of the event in hand are begun: until then the mediator knows of more than is true of
        this node, such as a head that serves behind a write that is under way."""
        with trio.move_on_after(EXECUTED_S):
            if self._executing:
                await self._changed.wait()

    async def run(self) -> None:
        """Handle events until cancelled."""
        async with self._events, trio.open_nursery() as nursery:
            while True:
                deadline = self.mediator.deadline()
                wake = min(deadline if deadline is not None else trio.current_time() + 1e9, self._latest())
                event: Event = TimePassed()
                with trio.move_on_at(wake):
                    event = await self._events.receive()
                self._executing = True
                await self._execute_all(self._handle(event), nursery)
                await self._rewrite()
                self._executing = False
                changed, self._changed = self._changed, trio.Event()
                changed.set()

    def _handle(self, event: Event) -> list[do.Effect]:
        """What the mediator decides. A message that it cannot stand costs its sender the link, and nobody the node."""
        try:
            return self.mediator.handle(event, trio.current_time())
        except Exception:
            if not isinstance(event, Received):
                raise
            log.exception("a message of %s could not be handled", event.peer)
            return [do.CloseLink(event.peer, BUG)]

    async def _execute_all(self, effects: list[do.Effect], nursery: trio.Nursery) -> None:
        written = True
        for effect in effects:
            if isinstance(effect, do.Write):
                written = await self._write(effect) and written
            elif written or not isinstance(effect, do.Resting):
                self._execute(effect, nursery)
            else:
                log.warning("%s is left out: what it rests on could not be written", type(effect).__name__)
                instead = in_place_of(effect)
                if instead is not None:
                    nursery.start_soon(self.post, instead)  # this loop itself makes room for it

    async def _write(self, effect: do.Write) -> bool:
        """Make it durable; False when that failed. The newest of each kind is tried again until it is."""
        try:
            await trio.to_thread.run_sync(self._disk.write, effect)
        except (OSError, MeshError) as error:
            log.exception("%s could not be done", type(effect).__name__)
            self._unwritten[type(effect)] = effect
            self._rewrite_at = trio.current_time() + REWRITE_S
            self.sick = f"its data directory cannot be written, so it takes no work: {error}"
            return False
        self._unwritten.pop(type(effect), None)
        if not self._unwritten:
            self.sick = ""
        return True

    async def _rewrite(self) -> None:
        """Make up for writes that failed: what they hold is believed here already."""
        if self._unwritten and trio.current_time() >= self._rewrite_at:
            for effect in list(self._unwritten.values()):
                await self._write(effect)

    async def _guard(self, instead: Event | None, act: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """An effect is not worth the node: our own bug in one is logged, and the mediator hears `instead`."""
        try:
            failed = await ends_by_bug(act, *arguments)
        except (MeshError, OSError):  # what is expected was handled below
            log.exception("%s failed", getattr(act, "__qualname__", "an effect"))
            failed = True
        if failed and instead is not None:
            await self.post(instead)

    def _execute(self, effect: do.Action, nursery: trio.Nursery) -> None:
        assert self._links is not None
        assert self._stages is not None
        assert self._heads is not None
        match effect:
            case do.Send():
                self._links.send(effect.peer, effect.message)
            case do.Dial():
                nursery.start_soon(self._guard, None, self._links.dial, effect.node, effect.addresses)
            case do.CloseLink():
                self._links.close(effect.peer, effect.reason)
            case do.OpenModel():
                nursery.start_soon(self._guard, self._not_opened(effect), self._open_model, effect.demand)
            case do.MakePlan():
                failed = PlanFailed(effect.deployment, effect.serial, BUG)
                nursery.start_soon(self._guard, failed, self._plan, effect)
            case do.PrepareStage():
                if self._stages.expect(effect.order, effect.reserved_bytes):
                    broken = StageReported(Failed(effect.order.fence, effect.order.stage, "internal", BUG))
                    nursery.start_soon(self._guard, broken, self._stages.prepare, effect.order)
            case do.ConnectStages():
                nursery.start_soon(self._guard, None, self._stages.connect, effect.fence)
            case do.StopStages():
                self._stages.stop(effect.fence, effect.kept)
            case do.RenewStages():
                nursery.start_soon(self._guard, None, self._stages.renew, effect.fence)
            case do.OpenHead() | do.ServeHead() | do.DrainHead() | do.CloseHead():
                self._execute_head(effect, nursery, self._heads)
            case do.Trace():
                log.info("%s", effect.message)
            case _:
                assert_never(effect)

    def _execute_head(self, effect: HeadEffect, nursery: trio.Nursery, heads: Heads) -> None:
        match effect:
            case do.OpenHead():
                heads.expect(effect.claim, effect.hops)
                lost = HeadFailed(effect.claim.fence, BUG)
                nursery.start_soon(self._guard, lost, heads.open, effect.claim, effect.hops, effect.created)
            case do.ServeHead():
                heads.serve(effect.fence)
            case do.DrainHead():
                heads.drain(effect.fence)
            case do.CloseHead():
                heads.close(effect.fence)
            case _:
                assert_never(effect)

    @staticmethod
    def _not_opened(effect: do.OpenModel) -> Event:
        return ModelNotOpened(effect.demand.deployment, BUG)

    async def _open_model(self, demand: Demand) -> None:
        assert self._models is not None
        await self._models.open(demand)

    async def _plan(self, order: do.MakePlan) -> None:
        try:
            outcome = await trio.to_thread.run_sync(make_plan, order.demand, order.footprint, order.inventory)
        except MeshError as error:
            await self.post(PlanFailed(order.deployment, order.serial, str(error)))
            return
        await self.post(Planned(order.deployment, order.serial, outcome))

    @staticmethod
    def _latest() -> float:
        return trio.current_time() + LONGEST_SLEEP_S
