"""What a node survives: bugs in its effects, messages that its mediator cannot stand, orders that cross."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

from meshnode.app.hops import HopSeats
from meshnode.app.runtime import BUG, EVENTS, Disk, Runtime, ends_by_bug
from meshnode.app.stages import Hosting, Post, SlicePaths, Stages
from meshnode.core.coordination.orders import Hops
from meshnode.core.node import effects as do
from meshnode.core.node.events import Event, HeadFailed, LinkClosed, ModelNotOpened, Received, StageReported, Stopping
from meshnode.core.node.left_out import AT_STAGE
from meshnode.errors import PeerError
from meshnode.identity.ids import NodeId
from meshnode.wire.demand import Demand, DeploymentId
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.messages import Commit, Failed, Hop, Ping, Prepare, RunOptions
from tests.core.coordination.claims import claim, fence

PEER = NodeId("peer")
BYTES = 1000
FENCE = Fence(Term(1), RunId("0" * 16))


def order() -> Prepare:
    hop = Hop(bytes(16), "s1.mesh", PEER)
    return Prepare(
        fence=FENCE,
        deployment="d",
        manifest_digest="m",
        source=PEER,
        stage=0,
        stages=1,
        first=0,
        last=1,
        layers=1,
        options=RunOptions(64, 1, 32, "f16", flash_attention=False),
        upstream=hop,
        downstream=hop,
    )


class Decides:
    """A mediator whose decisions a test hands in, by event."""

    def __init__(self, decide: Callable[[Event], list[do.Effect]]) -> None:
        self.handled: list[Event] = []
        self._decide = decide

    def handle(self, event: Event, now: float) -> list[do.Effect]:
        self.handled.append(event)
        return self._decide(event)

    def deadline(self) -> float | None:
        return None


class Shelf:
    """Slices that never arrive."""

    def __init__(self) -> None:
        self.asked = 0
        self.cancelled = 0
        self.released: list[SlicePaths] = []

    async def obtain(self, wanted: Prepare, progress: Callable[[int, int], None]) -> SlicePaths:
        self.asked += 1
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        return SlicePaths(Path("never"))

    def release(self, paths: SlicePaths) -> None:
        self.released.append(paths)


class Links:
    def __init__(self) -> None:
        self.closed: list[tuple[NodeId, str]] = []

    def close(self, peer: NodeId, reason: str) -> None:
        self.closed.append((peer, reason))

    async def dial(self, node: NodeId, addresses: tuple[str, ...]) -> None:
        raise ZeroDivisionError


class Heads:
    """None is opened here."""


class Models:
    """None is opened here either."""


async def unreachable(*_: object) -> Any:
    raise PeerError("nothing is dialed here")


class Node:
    """A runtime with real stages that wait for their slices."""

    def __init__(self, decide: Callable[[Event], list[do.Effect]]) -> None:
        self.mediator = Decides(decide)
        self.written: list[bytes] = []
        self.runtime = Runtime(self.mediator, Disk(*[self.written.append] * 3))
        self.shelf, self.links = Shelf(), Links()
        post = Post(self.runtime.post, self.runtime.hint)
        self.stages = Stages(lambda: None, HopSeats(), unreachable, self.shelf, post, Hosting(1, Path("unused")))
        self.runtime.attach(self.links, self.stages, Heads(), Models())


async def test_a_stage_that_is_stopped_before_its_task_began_never_runs(nursery: trio.Nursery) -> None:
    """Prepare and Abort in one packet: trio may run the second order before the task of the first."""

    def decide(event: Event) -> list[do.Effect]:
        return [do.PrepareStage(order(), BYTES), do.StopStages(FENCE)] if isinstance(event, Stopping) else []

    node = Node(decide)
    nursery.start_soon(node.runtime.run)
    await node.runtime.post(Stopping())
    await wait_all_tasks_blocked(0.01)
    assert node.shelf.asked == node.shelf.cancelled
    assert node.stages.expect(order(), BYTES), "the place is free again"


async def test_an_order_that_is_repeated_starts_one_stage(nursery: trio.Nursery) -> None:
    node = Node(lambda event: [do.PrepareStage(order(), BYTES)] * 2 if isinstance(event, Stopping) else [])
    nursery.start_soon(node.runtime.run)
    await node.runtime.post(Stopping())
    await wait_all_tasks_blocked(0.01)
    assert node.shelf.asked == 1


async def test_a_message_that_the_mediator_cannot_stand_costs_its_sender_the_link(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    def decide(event: Event) -> list[do.Effect]:
        assert not isinstance(event, Received), "not possible, we thought"
        return []

    node = Node(decide)
    nursery.start_soon(node.runtime.run)
    with caplog.at_level(logging.ERROR):
        await node.runtime.post(Received(PEER, Ping(1)))
        await node.runtime.post(LinkClosed(PEER, "gone"))
        await wait_all_tasks_blocked(0.01)
    assert [peer for peer, _ in node.links.closed] == [PEER]
    assert node.mediator.handled[-1] == LinkClosed(PEER, "gone")
    assert "could not be handled" in caplog.text


async def test_a_bug_in_an_effect_is_told_to_the_mediator_and_ends_nothing(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(lambda event: [do.PrepareStage(order(), BYTES)] if isinstance(event, Stopping) else [])

    async def broken(*_: object) -> SlicePaths:
        raise ZeroDivisionError

    monkeypatch.setattr(node.shelf, "obtain", broken)
    nursery.start_soon(node.runtime.run)
    with caplog.at_level(logging.ERROR):
        await node.runtime.post(Stopping())
        await wait_all_tasks_blocked(0.01)
    last = node.mediator.handled[-1]
    assert isinstance(last, StageReported)
    assert getattr(last.report, "reason", "") == "internal"


async def test_a_model_that_cannot_be_opened_for_a_bug_is_told_to_the_mediator(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = Demand(DeploymentId("d1"), 1, NodeId("author"), "0" * 64, "model")
    node = Node(lambda event: [do.OpenModel(wanted)] if isinstance(event, Stopping) else [])
    nursery.start_soon(node.runtime.run)
    with caplog.at_level(logging.ERROR):
        await node.runtime.post(Stopping())
        await wait_all_tasks_blocked(0.01)
    assert node.mediator.handled[-1] == ModelNotOpened("d1", BUG)


async def test_what_is_to_be_kept_is_written_before_what_follows(nursery: trio.Nursery) -> None:
    effects = [do.Persist(b"ledger"), do.KeepRevocations(b"lists"), do.KeepDemands(b"demands")]
    node = Node(lambda event: effects if isinstance(event, Stopping) else [])
    nursery.start_soon(node.runtime.run)
    await node.runtime.post(Stopping())
    await node.runtime.changed()
    assert node.written == [b"ledger", b"lists", b"demands"]


async def test_a_bug_is_told_from_what_a_peer_did(caplog: pytest.LogCaptureFixture) -> None:
    async def bug() -> None:
        raise ZeroDivisionError

    async def fine() -> None:
        pass

    with caplog.at_level(logging.ERROR):
        assert await ends_by_bug(bug)
    assert "bug failed" in caplog.text
    assert not await ends_by_bug(fine)
    with pytest.raises(PeerError):
        await ends_by_bug(unreachable)


async def test_a_slice_larger_than_what_was_claimed_for_it_is_not_loaded(nursery: trio.Nursery, tmp_path: Path) -> None:
    """The room was granted by the coordinator's word; the bytes are what they are."""
    path = tmp_path / "slice.gguf"
    path.write_bytes(bytes(BYTES + 1))

    def decide(event: Event) -> list[do.Effect]:
        return [do.PrepareStage(order(), BYTES)] if isinstance(event, Stopping) else []

    class Found(Shelf):
        async def obtain(self, wanted: Prepare, progress: Callable[[int, int], None]) -> SlicePaths:
            return SlicePaths(path)

    node = Node(decide)
    node.stages._slices = Found()
    nursery.start_soon(node.runtime.run)
    await node.runtime.post(Stopping())
    while not any(isinstance(event, StageReported) for event in node.mediator.handled):
        await node.runtime.changed()
    (told,) = [event.report for event in node.mediator.handled if isinstance(event, StageReported)]
    assert isinstance(told, Failed)
    assert told.reason == "claim_mismatch"
    assert node.stages._slices.released == [SlicePaths(path)]


async def test_what_was_fetched_for_later_stays_until_its_run_ends(nursery: trio.Nursery, tmp_path: Path) -> None:
    path = tmp_path / "slice.gguf"
    later = msgspec.structs.replace(order(), hold=True)
    orders: list[list[do.Effect]] = [[do.PrepareStage(later, BYTES)], [do.StopStages(FENCE)]]

    class Found(Shelf):
        async def obtain(self, wanted: Prepare, progress: Callable[[int, int], None]) -> SlicePaths:
            return SlicePaths(path)

    node = Node(lambda event: orders.pop(0) if isinstance(event, Stopping) else [])
    node.stages._slices = slices = Found()
    nursery.start_soon(node.runtime.run)
    await node.runtime.post(Stopping())
    while not any(isinstance(event, StageReported) for event in node.mediator.handled):
        await node.runtime.changed()
    assert slices.released == []
    await node.runtime.post(Stopping())
    await wait_all_tasks_blocked(0.01)
    assert slices.released == [SlicePaths(path)]


class FullDisk:
    """Fails until there is room; remembers what was written."""

    def __init__(self) -> None:
        self.full = True
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.written.append(data)


def on_a_full_disk(effects: list[do.Effect]) -> tuple[Node, FullDisk]:
    node, disk = Node(lambda event: effects if isinstance(event, Stopping) else []), FullDisk()
    node.runtime._disk = Disk(disk.write, disk.write, disk.write)
    return node, disk


async def test_behind_a_failed_write_nothing_is_promised_and_everything_that_frees_still_happens(
    nursery: trio.Nursery,
) -> None:
    """An order to fence off is [Persist, StopStages]: the ledger booked the memory out already."""
    said: list[NodeId] = []
    promised = [do.Send(PEER, Ping(1)), do.PrepareStage(order(), BYTES)]
    node, _ = on_a_full_disk(
        [
            do.PrepareStage(order(), BYTES),
            do.Persist(b""),
            *promised,
            do.StopStages(FENCE),
            do.CloseLink(PEER, "over"),
        ]
    )
    node.links.send = lambda peer, message: said.append(peer)
    nursery.start_soon(node.runtime.run)
    await node.runtime.post(Stopping())
    while not node.links.closed:
        await trio.lowlevel.checkpoint()
    await wait_all_tasks_blocked(0.01)
    assert said == []
    assert not node.stages._running, "the stage that was fenced off is gone"
    assert node.shelf.asked == node.shelf.cancelled
    assert node.links.closed == [(PEER, "over")]


async def test_what_a_run_waits_for_and_was_left_out_ends_it_by_name(nursery: trio.Nursery) -> None:
    left_out = [
        do.OpenHead(claim(), Hops((), ()), 0),
        do.ServeHead(fence(2)),
        do.Send(PEER, Commit(fence(3))),
        do.Send(PEER, Ping(1)),
        do.DrainHead(fence(5)),
        do.PrepareStage(order(), BYTES),
    ]
    node, _ = on_a_full_disk([do.Persist(b""), *left_out])
    nursery.start_soon(node.runtime.run)
    await node.runtime.post(Stopping())
    while len(node.mediator.handled) < 5:
        await node.runtime.changed()
    heard = [event for event in node.mediator.handled if isinstance(event, HeadFailed | StageReported)]
    assert {event.fence for event in heard if isinstance(event, HeadFailed)} == {fence(1), fence(2), fence(3)}
    assert {event.reason for event in heard if isinstance(event, HeadFailed)} == {"disk"}
    (stage,) = [event.report for event in heard if isinstance(event, StageReported)]
    assert stage == Failed(FENCE, 0, "disk", AT_STAGE)


async def test_a_write_that_succeeds_does_not_let_out_what_stands_behind_one_that_failed(
    nursery: trio.Nursery,
) -> None:
    said: list[NodeId] = []
    node, disk = on_a_full_disk([do.Persist(b"ledger"), do.KeepDemands(b"demands"), do.Send(PEER, Ping(1))])
    demands: list[bytes] = []
    node.runtime._disk = Disk(disk.write, disk.write, demands.append)
    node.links.send = lambda peer, message: said.append(peer)
    nursery.start_soon(node.runtime.run)
    await node.runtime.post(Stopping())
    await node.runtime.changed()
    assert (demands, said) == ([b"demands"], [])


@pytest.mark.parametrize("effect", [do.Persist(b"it"), do.KeepRevocations(b"it"), do.KeepDemands(b"it")])
async def test_a_write_that_failed_is_made_up_for_and_the_node_is_well_again(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, effect: do.Write
) -> None:
    node, disk = on_a_full_disk([effect])
    nursery.start_soon(node.runtime.run)
    await node.runtime.post(Stopping())
    await node.runtime.changed()
    assert "No space left" in node.runtime.sick
    disk.full = False
    while node.runtime.sick:
        await node.runtime.changed()
    assert (node.runtime.sick, disk.written) == ("", [b"it"])


async def test_events_that_come_when_the_node_has_ended_hold_nobody_up() -> None:
    node = Node(lambda event: [])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.runtime.run)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    for _ in range(EVENTS + 1):
        await node.runtime.post(Stopping())
    node.runtime.hint(Stopping())
    assert node.mediator.handled == []


async def test_who_asks_for_the_status_waits_for_what_the_mediator_decided_to_be_done(nursery: trio.Nursery) -> None:
    written = threading.Event()
    node = Node(lambda event: [do.Persist(b""), do.CloseLink(PEER, "gone")] if isinstance(event, Stopping) else [])
    node.runtime = Runtime(node.mediator, Disk(*[lambda _: written.wait(timeout=10)] * 3))
    node.runtime.attach(node.links, node.stages, Heads(), Models())
    nursery.start_soon(node.runtime.run)
    await node.runtime.executed()  # nothing is under way
    await node.runtime.post(Stopping())
    await wait_all_tasks_blocked()
    assert not node.links.closed
    written.set()
    await node.runtime.executed()
    assert node.links.closed == [(PEER, "gone")]
