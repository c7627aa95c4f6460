"""Plans as they really run: against the arithmetic, and against the best single machine."""

from __future__ import annotations

import pytest

from meshnode.core.planning import Demand, DeploymentId, Inventory, NodeInventory, Plan, make_plan
from meshnode.core.planning.inventory import LinkInventory
from meshnode.identity.ids import NodeId
from sim.rates import MB, MODEL, compare, rate

A, B = NodeId("a"), NodeId("b")


def machine(name: NodeId, usable: int, gb_per_s: int) -> NodeInventory:
    fast = gb_per_s * 10**9
    return NodeInventory(
        name, name, usable, decode_bytes_per_s=fast, prefill_bytes_per_s=8 * fast, layer_us=10, stage_us=500
    )


def links(rtt_us: int) -> tuple[LinkInventory, ...]:
    return LinkInventory(A, B, rtt_us, 10**8), LinkInventory(B, A, rtt_us, 10**8)


def planned(inventory: Inventory, **wanted: object) -> Plan:
    demand = Demand(DeploymentId("d"), 1, A, MODEL.manifest_digest, "model", context=1024, kv_type="q8_0", **wanted)
    found = make_plan(demand, MODEL, inventory)
    assert isinstance(found, Plan)
    return found


def test_one_machine_gives_what_its_memory_can_read() -> None:
    alone = Inventory((machine(A, 8000 * MB, 10),))
    token_s = (32 * 120 * MB + 70 * MB) / 10e9 + 32 * 10e-6 + 500e-6
    assert rate(planned(alone), alone) == pytest.approx(1 / token_s)


def test_a_split_gives_what_the_planner_predicts_but_for_the_cache_it_reads() -> None:
    two = Inventory((machine(A, 3000 * MB, 10), machine(B, 3000 * MB, 20)), links(2000))
    plan = planned(two)
    assert len(plan.stages) == 2
    assert plan.prediction is not None
    assert rate(plan, two) == pytest.approx(1e6 / plan.prediction.token_us, rel=0.05)


def test_a_split_that_should_not_be_is_seen_as_slower_than_one_machine() -> None:
    far = Inventory((machine(A, 8000 * MB, 10), machine(B, 8000 * MB, 10)), links(100_000))
    assert rate(planned(far, cuts=(16,)), far) < 0.97 * rate(planned(far), far)


@pytest.mark.parametrize("seed", range(20))
def test_more_machines_do_not_make_it_slower_though_measurements_are_a_little_off(seed: int) -> None:
    assert compare(seed, 0.03).ratio >= 0.97


def test_some_of_these_inventories_are_worth_a_split() -> None:
    found = [compare(seed, 0.03) for seed in range(20)]
    assert {each.nodes > 1 for each in found} == {True, False}
    assert max(each.ratio for each in found) > 1.2
