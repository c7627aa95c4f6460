"""What a stage takes against what was claimed for it: real files, a real shelf, and coordinators that lie."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from meshnode.app.hops import HopSeats
from meshnode.app.shelf import LocalModel, Shelf, needed_bytes
from meshnode.app.stages import Hosting, Post, Stages
from meshnode.core.coordination.run import Run
from meshnode.core.node.claims import claim_of, hops_of
from meshnode.core.node.effects import Kept
from meshnode.core.node.events import Event, StageReported
from meshnode.core.planning import Demand, DeploymentId, Inventory, NodeInventory, Plan, make_plan
from meshnode.errors import StageError
from meshnode.wire.messages import Failed, Prepare, Ready
from tests.core.coordination.claims import A, B, fence
from tests.factory.models import build
from tests.identity.mesh import TestMesh
from tests.io.stage.neighbour import PATIENCE_S


def nowhere(*_: object) -> Any:
    raise AssertionError("nothing is fetched or dialed here")


async def shelf(tmp_path: Path, **shape: Any) -> tuple[Shelf, LocalModel]:
    made = Shelf(tmp_path / "cache", nowhere, A)
    return made, await made.open(build(tmp_path / "m.gguf", layers=4, **shape), lambda done, total: None)


def orders(local: LocalModel, *nodes: NodeInventory) -> list[tuple[Prepare, int]]:
    """What an honest coordinator orders of each stage, and what it claimed for it."""
    demand = Demand(DeploymentId("d1"), 1, A, local.digest, local.name, context=256, cuts=(2,) * (len(nodes) > 1))
    plan = make_plan(demand, local.footprint, Inventory(nodes))
    assert isinstance(plan, Plan)
    claim = claim_of(plan, fence(), A, 4, None)
    run = Run(claim, A, hops_of(claim, secrets.token_bytes), 60.0)
    return [(run._prepare(stage.stage), stage.reserved_bytes) for stage in claim.stages]


@pytest.mark.parametrize("tied", [True, False])
async def test_what_a_slice_takes_by_its_manifest_is_what_an_honest_plan_claims(tmp_path: Path, tied: bool) -> None:
    books, local = await shelf(tmp_path, tied=tied)
    room = 10**9
    one, two = NodeInventory(A, "a", room), NodeInventory(B, "b", room)
    whole, halves = orders(local, one), orders(local, one, two)
    assert [len(whole), len(halves)] == [1, 2]
    for order, claimed in (*whole, *halves):
        assert (await books.obtain(order, lambda done, total: None)).needed_bytes == claimed
    books.close()


@pytest.mark.parametrize(
    "change",
    [{"context": 0}, {"context": -5}, {"lanes": 0}, {"lanes": 10**6}, {"chunk": 0}, {"chunk": 10**6}, {"kv_type": "x"}],
)
async def test_options_that_no_stage_runs_with_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    books, local = await shelf(tmp_path)
    books.close()
    ((order, _),) = orders(local, NodeInventory(A, "a", 10**9))
    wrong = msgspec.structs.replace(order, options=msgspec.structs.replace(order.options, **change))
    with pytest.raises(StageError) as refused:
        needed_bytes(local.footprint, wrong)
    assert refused.value.reason == "bad_options"


@pytest.mark.native
@pytest.mark.parametrize("honest", [True, False])
async def test_a_stage_that_takes_more_than_was_claimed_is_not_loaded(
    tmp_path: Path, nursery: trio.Nursery, honest: bool
) -> None:
    """A cache that was kept quiet: the weights alone would fit into what was booked."""
    books, local = await shelf(tmp_path)
    reports, heard = trio.open_memory_channel[Event](64)
    own = TestMesh().node()
    post = Post(reports.send, lambda event: None)
    stages = Stages(lambda: own, HopSeats(), nowhere, books, post, Hosting(1, tmp_path / "stages.lock"))
    ((order, claimed),) = orders(local, NodeInventory(A, "a", 10**9))
    weights = local.path.stat().st_size
    assert stages.expect(order, claimed if honest else claimed - claimed // 50)
    assert claimed - claimed // 50 > weights
    nursery.start_soon(stages.prepare, order)
    with trio.fail_after(PATIENCE_S):
        report = await heard.receive()
    assert isinstance(report, StageReported)
    assert isinstance(report.report, Failed) is not honest
    if isinstance(report.report, Failed):
        assert report.report.reason == "claim_mismatch"
        assert str(claimed) in report.report.message
        assert stages.pids() == {}
    stages.stop(order.fence)
    books.close()


@pytest.mark.native
async def test_a_loaded_stage_is_not_taken_over_for_less_than_it_takes(tmp_path: Path, nursery: trio.Nursery) -> None:
    books, local = await shelf(tmp_path)
    reports, heard = trio.open_memory_channel[Event](64)
    own = TestMesh().node()
    post = Post(reports.send, lambda event: None)
    stages = Stages(lambda: own, HopSeats(), nowhere, books, post, Hosting(1, tmp_path / "stages.lock"))
    ((order, claimed),) = orders(local, NodeInventory(A, "a", 10**9))
    later = msgspec.structs.replace(order, fence=fence(2, 2))
    with trio.fail_after(PATIENCE_S):
        stages.expect(order, claimed)
        nursery.start_soon(stages.prepare, order)
        assert await heard.receive() == StageReported(Ready(order.fence, 0))
        stages.stop(order.fence, (Kept(0, later.fence, 0),))
        stages.expect(later, claimed // 2)
        await stages.prepare(later)
        told = await heard.receive()
    assert isinstance(told, StageReported)
    assert isinstance(told.report, Failed)
    assert (told.report.fence, told.report.reason) == (later.fence, "claim_mismatch")
    books.close()
