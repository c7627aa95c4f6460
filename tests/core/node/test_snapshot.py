"""What people are told of a run on its way, and of a machine that is to be spared."""

from __future__ import annotations

import pytest

from meshnode.core.node import events as on
from meshnode.core.node.snapshot import _phase
from meshnode.identity.ids import NodeId
from meshnode.wire.fence import Fence, Term, run_id
from meshnode.wire.messages import Claim, ClaimedStage, Progress, RunOptions
from tests.core.node.mesh import World, name_to_id

FENCE = Fence(Term(1), run_id(bytes(8)))


def claim(*weights: int) -> Claim:
    stages = tuple(
        ClaimedStage(number, NodeId("n"), number, number + 1, weight, 0, weight)
        for number, weight in enumerate(weights)
    )
    return Claim(
        fence=FENCE,
        deployment="d",
        model="m",
        manifest_digest="0" * 64,
        plan_digest="0" * 64,
        coordinator=NodeId("n"),
        layers=len(weights),
        options=RunOptions(256, 4, 128, "q8_0", flash_attention=True),
        stages=stages,
    )


@pytest.mark.parametrize(
    ("states", "done", "told"),
    [
        ({}, {}, ("claimed", 0)),
        ({0: "fetching", 1: "fetching"}, {0: 50, 1: 0}, ("fetching", 12)),
        ({0: "loading", 1: "fetching"}, {0: 999, 1: 50}, ("fetching", 62)),
        ({0: "loading", 1: "loading"}, {0: 100, 1: 50}, ("loading", 62)),
        ({0: "ready", 1: "loading"}, {1: 200}, ("loading", 100)),
        ({0: "connected", 1: "ready"}, {}, ("ready", 25)),
        ({0: "failed", 1: "loading"}, {1: 0}, ("loading", 25)),
    ],
)
def test_the_phase_is_that_of_the_slowest_stage_and_per_cent_are_of_weights(
    states: dict[int, str], done: dict[int, int], told: tuple[str, int]
) -> None:
    progress = {number: Progress(FENCE, number, states[number], part, 100) for number, part in done.items()}
    assert _phase(claim(25, 75), states, progress) == told


def test_a_machine_that_cannot_be_spared_yet_is_named() -> None:
    mesh = World()
    for name, memory in (("a", 400), ("b", 2000)):
        mesh.add(name, memory)
    mesh.meet("a", "b")
    mesh.run(3)
    mesh.serve("a")
    mesh.run(3)
    (before,) = mesh.status("a").deployments
    assert (before.state, before.phase, before.note) == ("serving", "", "")
    mesh.hand("a", on.DrainWanted(name_to_id("b")))
    mesh.run(5)
    now = mesh.status("a")
    assert [peer.draining for peer in now.peers] == [True]
    assert mesh.status("b").draining
    assert (now.deployments[0].run, now.deployments[0].state) == (before.run, "serving")
    assert now.deployments[0].note.startswith("b: draining")
