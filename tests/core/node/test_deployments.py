"""In whose place the next run of a deployment comes."""

from __future__ import annotations

import pytest

from meshnode.core.coordination.orders import Ended
from meshnode.core.coordination.run import State
from meshnode.core.node.deployments import LOOK_S, SETTLE_MAX_S, SETTLE_S, Deployment, Exclusion, Place
from meshnode.core.planning import Inventory, NodeInventory, Plan, Shortfall, make_plan
from tests.core.coordination.claims import A, B, C
from tests.core.planning.models import MB, RESERVE, demand, footprint

ROOM = RESERVE + 2000 * MB


def machines(*excluded: str) -> Inventory:
    """a is being drained; b and c may take its work, but for those that may not."""
    reasons = {A: "draining"} | dict.fromkeys(excluded, "draining")
    return Inventory(tuple(NodeInventory(node, node[:1], ROOM, excluded=reasons.get(node, "")) for node in (A, B, C)))


def plan_for(inventory: Inventory) -> Plan:
    found = make_plan(demand(author=A, context=256), footprint(), inventory)
    assert isinstance(found, Plan)
    return found


def shortfall_of(inventory: Inventory) -> Shortfall:
    found = make_plan(demand(author=A, context=256), footprint(), inventory)
    assert isinstance(found, Shortfall)
    return found


def draw(count: int) -> bytes:
    return bytes(count)


def served_by_a(wanted: Deployment) -> None:
    """A first run, on a alone."""
    everybody = Inventory(tuple(NodeInventory(node, node[:1], ROOM) for node in (A,)))
    assert wanted.due(0.0)
    wanted.view(everybody, 0.0)
    run = wanted.planned(wanted.serial, plan_for(everybody), draw, 0.0)
    assert run is not None
    run.state = State.SERVING
    wanted.served(0.0)


def test_what_failed_once_and_is_tried_again_has_not_failed() -> None:
    wanted = Deployment(demand(author=A), footprint(), 0, A, 60.0, 5.0)
    assert not wanted.failed
    wanted.failures = 1
    assert wanted.failed, "it waits for its next attempt"
    wanted.plan_at = 0.0
    served_by_a(wanted)
    wanted.failures = 1
    assert not wanted.failed, "a run of it is there"


@pytest.mark.parametrize(("place", "asked"), [(Place.BESIDE, machines()), (Place.INSTEAD, machines())])
def test_a_run_on_other_machines_takes_nobodys_place_whatever_memory_was_counted(
    place: Place, asked: Inventory
) -> None:
    """The memory that seemed to be taken there was that of an attempt which has ended since: the present run need not
    end before the new one serves."""
    wanted = Deployment(demand(author=A), footprint(), 0, A, 60.0, 0.0)
    served_by_a(wanted)
    wanted.place = place
    wanted.plan_at = 1.0
    assert wanted.due(1.0)
    wanted.view(asked, 1.0)
    run = wanted.planned(wanted.serial, plan_for(asked), draw, 1.0)
    assert run is not None
    assert {stage.node for stage in run.claim.stages} <= {B, C}
    assert run.claim.releases is None
    assert not run.drain_first


def test_a_run_that_shares_a_machine_with_the_present_one_comes_in_its_place() -> None:
    wanted = Deployment(demand(author=A), footprint(), 0, A, 60.0, 0.0)
    served_by_a(wanted)
    present = wanted.current
    assert present is not None
    half = RESERVE + 600 * MB
    split = plan_for(Inventory((NodeInventory(A, "a", half), NodeInventory(B, "b", half))))
    wanted.place, wanted.plan_at = Place.INSTEAD, 1.0
    assert wanted.due(1.0)
    wanted.view(machines(C), 1.0)  # a is to be spared, so any plan is taken
    run = wanted.planned(wanted.serial, split, draw, 1.0)
    assert run is not None
    assert {stage.node for stage in run.claim.stages} == {A, B}
    assert run.claim.releases == present.fence
    assert run.drain_first


def test_a_machine_that_comes_while_a_shortfall_is_worked_out_is_planned_with_at_once() -> None:
    wanted = Deployment(demand(author=A), footprint(), 0, A, 60.0, 0.0)
    nobody = Inventory(())
    assert wanted.due(0.0)
    wanted.view(nobody, 0.0)
    wanted.changed(0.1, ())
    assert wanted.planned(wanted.serial, shortfall_of(nobody), draw, 0.2) is None
    assert wanted.wake_at() == pytest.approx(0.2 + SETTLE_S)
    assert wanted.due(1.0)
    wanted.view(nobody, 1.0)
    assert wanted.planned(wanted.serial, shortfall_of(nobody), draw, 1.1) is None
    assert wanted.wake_at() is None, "nothing changed since, and nothing is asked again"


def test_changes_that_never_settle_put_a_plan_off_for_a_second_and_no_longer() -> None:
    """Thirty nodes that announce themselves leave no pause of SETTLE_S."""
    wanted = Deployment(demand(author=A), footprint(), 0, A, 60.0, None)
    for planned_at in (SETTLE_MAX_S, 2 * SETTLE_MAX_S):
        first = planned_at - SETTLE_MAX_S
        for change in range(10):
            wanted.changed(first + change * SETTLE_S / 2, ())
            assert not wanted.due(first + change * SETTLE_S / 2)
        assert wanted.wake_at() == pytest.approx(planned_at)
        assert wanted.due(planned_at)
        wanted.view(Inventory(()), planned_at)
        assert wanted.planned(wanted.serial, shortfall_of(Inventory(())), draw, planned_at) is None


def test_a_run_that_breaks_while_its_better_is_looked_for_is_followed_by_a_plan_in_its_own_memory() -> None:
    wanted = Deployment(demand(author=A), footprint(), 0, A, 60.0, 0.0)
    served_by_a(wanted)
    assert wanted.current is not None
    assert wanted.due(LOOK_S)
    wanted.view(Inventory(()), LOOK_S)
    wanted.current.state = State.BROKEN
    wanted.ended(wanted.current, Ended(wanted.current.fence, "stage_lost", "its process ended"), draw, LOOK_S)
    assert wanted.planned(wanted.serial, shortfall_of(Inventory(())), draw, LOOK_S) is None
    assert wanted.due(LOOK_S + SETTLE_S)
    assert wanted.place is Place.INSTEAD


def test_what_came_to_nothing_is_not_asked_again_until_something_changed() -> None:
    wanted = Deployment(demand(author=A), footprint(), 0, A, 60.0, 0.0)
    small = Inventory((NodeInventory(A, "a", RESERVE),))
    assert wanted.due(0.0)
    assert not wanted.knows(wanted.view(small, 0.0), 0.0)
    wanted.planned(wanted.serial, shortfall_of(small), draw, 0.1)
    wanted.changed(1.0)
    assert wanted.due(1.0 + SETTLE_S)
    assert wanted.knows(wanted.view(small, 2.0), 2.0)
    assert wanted.wake_at() is None
    wanted.changed(3.0)
    assert wanted.due(3.0 + SETTLE_S)
    assert not wanted.knows(wanted.view(machines(), 4.0), 4.0)


def test_both_ways_of_asking_are_remembered_while_a_node_that_failed_is_left_out() -> None:
    wanted = Deployment(demand(author=A), footprint(), 0, A, 60.0, 0.0)
    wanted.excluded[A] = Exclusion(600.0, "failed")
    small = Inventory((NodeInventory(A, "a", RESERVE),))
    for _ in ("without it", "with it"):
        assert wanted.due(0.0)
        assert not wanted.knows(wanted.view(small, 0.0), 0.0)
        wanted.planned(wanted.serial, shortfall_of(small), draw, 0.0)
    wanted.changed(1.0)
    for _ in ("without it", "with it"):
        assert wanted.due(2.0)
        assert wanted.knows(wanted.view(small, 2.0), 2.0)
    assert wanted.wake_at() == 600.0
    assert wanted.due(600.0)
    assert wanted.knows(wanted.view(small, 600.0), 600.0), "it failed once, was asked with then, and counts again now"
