"""What a node tells its stages of revoked neighbours: a real stage process behind a real seat."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from meshnode.app.hops import HopSeats
from meshnode.app.stages import Hosting, Post, SlicePaths, Stages
from meshnode.core.node.events import Event, StageReported
from meshnode.errors import LinkLost
from meshnode.identity.certificates import stage_name
from meshnode.identity.ids import NodeId
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.messages import Hop, Prepare, Ready
from tests.factory import build
from tests.identity.mesh import TestMesh
from tests.io.stage.neighbour import OPTIONS, PATIENCE_S, tcp_pair

BEFORE, BEHIND, ELSEWHERE = (NodeId(letter * 51 + "a") for letter in "bcd")
FENCE = Fence(Term(1), RunId("0123456789abcdef"))
TOKEN = bytes(range(16))
ROOM = 1_000_000_000
"""Bytes that the claim booked for the stage: more than its slice has."""
ORDER = Prepare(
    fence=FENCE,
    deployment="d1",
    manifest_digest="",
    source=BEFORE,
    stage=0,
    stages=1,
    first=0,
    last=2,
    layers=2,
    options=OPTIONS,
    upstream=Hop(TOKEN, stage_name(0, FENCE.run, BEFORE), BEFORE),
    downstream=Hop(bytes(16), stage_name(2, FENCE.run, BEHIND), BEHIND),
)


class Disk:
    """A model that lies here already."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def obtain(self, order: Prepare, progress: Callable[[int, int], None]) -> SlicePaths:
        await trio.lowlevel.checkpoint()
        return SlicePaths(self._path)

    def release(self, paths: SlicePaths) -> None:
        pass


async def nobody(node: NodeId, token: bytes) -> socket.socket:
    raise LinkLost("nobody is dialed in this test")


async def ended(seats: HopSeats, caplog: pytest.LogCaptureFixture) -> str:
    """A neighbour comes and goes away again; what the node's log says of it."""
    caplog.clear()
    ours, its = tcp_pair()
    await seats.arrived(TOKEN, its)
    ours.close()
    with trio.fail_after(PATIENCE_S):
        while "was refused" not in caplog.text:
            await trio.lowlevel.checkpoint()
    return caplog.text


@pytest.mark.native
@pytest.mark.parametrize("revoked", [BEFORE, BEHIND])
@pytest.mark.parametrize("known_before_it_loads", [True, False])
async def test_a_stage_with_a_revoked_neighbour_takes_no_connection_any_more(
    tmp_path: Path,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
    revoked: NodeId,
    known_before_it_loads: bool,
) -> None:
    reports, heard = trio.open_memory_channel[Event](64)
    own, seats = TestMesh().node(), HopSeats()
    post = Post(reports.send, lambda event: None)
    stages = Stages(
        lambda: own,
        seats,
        nobody,
        Disk(build(tmp_path / "tiny.gguf", layers=2)),
        post,
        Hosting(1, tmp_path / "stages.lock"),
    )
    await stages.bar(lambda node: node == (revoked if known_before_it_loads else ELSEWHERE))
    assert stages.expect(ORDER, ROOM)
    nursery.start_soon(stages.prepare, ORDER)
    with trio.fail_after(PATIENCE_S):
        report = await heard.receive()
    assert report == StageReported(Ready(FENCE, 0))
    if not known_before_it_loads:
        assert "TLS handshake failed" in await ended(seats, caplog), "another node's end is nothing to it"
        await stages.bar(lambda node: node == revoked)
    assert "neighbours come after credentials" in await ended(seats, caplog)
    stages.stop(FENCE)
