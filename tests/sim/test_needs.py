"""What is not served after a heal is found, and what there is no room for is not asked of anybody."""

from __future__ import annotations

import pytest

from meshnode.core.node import effects as do
from sim import needs
from sim.engine import Engine
from sim.machine import Machine
from sim.profiles import CALM
from sim.trial import populate
from sim.world import World


def serving(nodes: int) -> tuple[World, list[Machine]]:
    world = World(1, CALM)
    populate(world, nodes)
    world.agenda.run(3.0)
    machines = list(world.machines.values())
    world.serve(machines[0])
    world.agenda.run(15.0)
    assert needs.unserved(world, 3.0) == []
    return world, machines


def plans_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for, no plan comes."""
    carry_out = Engine.carry_out
    monkeypatch.setattr(
        Engine, "carry_out", lambda self, effect: None if isinstance(effect, do.MakePlan) else carry_out(self, effect)
    )


def test_a_demand_for_which_there_is_room_is_to_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    world, machines = serving(6)
    plans_fail(monkeypatch)
    world.serve(machines[1])
    world.agenda.run(20.0)
    (found,) = needs.unserved(world, 3.0)
    assert "is planning" in found


def test_a_demand_for_which_there_is_no_room_beside_what_serves_may_wait() -> None:
    world, machines = serving(5)
    world.serve(machines[1])
    world.agenda.run(25.0)
    assert len(world.wanted()) == 2
    assert needs.unserved(world, 3.0) == []


def test_room_counts_by_what_machines_hold_not_by_how_many_pipelines_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five machines are expected to carry one; where the first run left enough of them, a second one is owed."""
    world, machines = serving(5)
    plans_fail(monkeypatch)
    world.serve(machines[1])
    world.agenda.run(18.0)
    assert needs.unserved(world, 3.0) == []
    monkeypatch.setattr("sim.needs._loaded", lambda _: [])
    assert len(needs.unserved(world, 3.0)) == 1


def test_a_run_that_answers_nobody_does_not_count_as_serving() -> None:
    world, _ = serving(5)
    assert [found.split(": ")[1] for found in needs.unserved(world, world.now)] == ["nobody got an answer"]


def test_a_demand_that_nobody_cares_for_is_found() -> None:
    world, machines = serving(5)
    assert machines[0].mediator is not None
    machines[0].mediator.deployments.clear()
    assert [found.split(": ")[1] for found in needs.unserved(world, 3.0)] == ["nobody coordinates it"]
