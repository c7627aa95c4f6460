"""Times by hand, and that the plan follows them."""

import random

import msgspec
import pytest

from meshnode.core.planning import Inventory, LayerFootprint, NodeInventory, Plan, make_plan
from meshnode.core.planning.inventory import LinkInventory
from meshnode.core.planning.pace import NEVER, pace_of
from tests.core.planning.models import MB, RESERVE, demand, footprint, inventory

KV_256 = 256 * 1024 // 32 * 34  # bytes of a layer's cache at 256 tokens


def machine(name, room, **more):
    return NodeInventory(name, name.upper(), RESERVE + room, **more)


def fast_and_roomy():
    """One that holds it all at 1 GB/s, and one that holds half of it at 10 GB/s."""
    return machine("a", 2000 * MB, decode_bytes_per_s=10**9), machine("b", 450 * MB, decode_bytes_per_s=10**10)


def test_a_stage_reads_its_weights_and_cache_and_a_hop_takes_half_a_round_trip_and_its_frame():
    nodes = (
        machine("a", 500 * MB, decode_bytes_per_s=10**9, layer_us=100, stage_us=1000),
        machine("b", 500 * MB, decode_bytes_per_s=10**9, layer_us=100, stage_us=1000),
    )
    links = (
        LinkInventory("a", "b", rtt_us=4000, bytes_per_s=10**6),
        LinkInventory("b", "a", rtt_us=4000, bytes_per_s=10**6),
    )
    plan = make_plan(demand(context=256), footprint(width=500), Inventory(nodes, links))
    first, last = plan.prediction.stages
    assert plan.nodes == ("b", "a")  # the author need not fetch the larger end
    assert first.compute_us == (4 * (100 * MB + KV_256)) // 1000 + 400 + 1000
    assert last.compute_us == (4 * (100 * MB + KV_256) + 40 * MB) // 1000 + 400 + 1000
    assert (first.wire_us, last.wire_us) == (2000 + 256, 2000 + 256 + 1000)
    assert plan.prediction.return_us == 0  # the head is with the author
    assert plan.prediction.wire_us == first.wire_us + last.wire_us
    assert plan.prediction.token_us == plan.prediction.compute_us + plan.prediction.wire_us


def test_a_chunk_of_a_prompt_takes_its_rows_by_the_prefill_speed():
    node = machine("a", 2000 * MB, prefill_bytes_per_s=128 * 10**9, stage_us=500)
    plan = make_plan(demand(context=256), footprint(), Inventory((node,)))
    assert plan.prediction.stages[0].chunk_us == (840 * MB + 8 * KV_256) // 1000 + 500


def test_what_was_not_measured_is_assumed_and_said():
    known = machine("b", 2000 * MB, decode_bytes_per_s=10**10, stage_us=600)
    plans = [make_plan(demand(author=n.node), footprint(), Inventory((n,))) for n in (machine("a", 2000 * MB), known)]
    assert plans[0].prediction.token_us == plans[1].prediction.token_us
    assert [plan.prediction.stages[0].measured for plan in plans] == [False, True]


def test_a_split_that_is_much_faster_than_the_only_node_that_holds_it_is_taken_and_compared_with_it():
    plan = make_plan(demand(context=256), footprint(), Inventory(fast_and_roomy()))
    assert sorted(plan.nodes) == ["a", "b"]
    assert plan.prediction.single.node == "a"
    assert plan.prediction.token_us * 100 < plan.prediction.single.token_us * 85


def test_a_split_that_gains_less_than_predictions_are_wrong_is_not_taken():
    slow, _ = fast_and_roomy()
    little = machine("b", 140 * MB, decode_bytes_per_s=10**10)  # one layer of eight
    plan = make_plan(demand(context=256), footprint(), Inventory((slow, little)))
    assert plan.nodes == ("a",)


def test_a_far_helper_is_left_out():
    far = LinkInventory("a", "b", rtt_us=1_000_000)
    assert make_plan(demand(context=256), footprint(), Inventory(fast_and_roomy(), (far,))).nodes == ("a",)


def test_of_single_nodes_the_fastest_is_taken_and_among_equals_the_one_that_need_not_fetch():
    def chosen(speed):
        nodes = (machine("a", 2000 * MB, decode_bytes_per_s=10**9), machine("b", 3000 * MB, decode_bytes_per_s=speed))
        return make_plan(demand(context=256), footprint(), Inventory(nodes)).nodes

    assert chosen(1_020_000_000) == ("a",)
    assert chosen(1_100_000_000) == ("b",)


def test_layers_move_for_more_context_between_equally_fast_nodes_but_not_to_a_slow_one():
    def planned(speed):
        nodes = (machine("a", 900 * MB, decode_bytes_per_s=10**10), machine("b", 900 * MB, decode_bytes_per_s=speed))
        return make_plan(demand(), footprint(10, weight=90 * MB, trained=1 << 20), Inventory(nodes))

    slow, equal = planned(10**9), planned(10**10)
    assert slow.context >= 8192
    assert equal.context > slow.context


@pytest.mark.parametrize("seed", range(20))
def test_no_plan_is_predicted_below_97_percent_of_the_best_single_node(seed):
    pick = random.Random(seed)
    names = [f"n{index}" for index in range(pick.randint(2, 9))]
    nodes = [
        machine(name, pick.randint(300, 2000) * MB, decode_bytes_per_s=pick.randint(1, 60) * 10**9) for name in names
    ]
    nodes[0] = msgspec.structs.replace(nodes[0], usable_bytes=RESERVE + 2000 * MB)
    links = tuple(
        LinkInventory(one, other, pick.randint(100, 30_000), pick.randint(10**6, 10**8))
        for one in names
        for other in names
        if one != other
    )
    model, asked = footprint(), demand(author=pick.choice(names), context=256)
    plan = make_plan(asked, model, Inventory(tuple(nodes), links))
    assert isinstance(plan, Plan)
    for node in nodes:
        alone = make_plan(msgspec.structs.replace(asked, pins=(node.node,)), model, Inventory(tuple(nodes), links))
        if isinstance(alone, Plan):
            assert plan.prediction.token_us * 97 <= alone.prediction.token_us * 100


def test_numbers_that_a_hostile_peer_may_tell_stay_within_64_bits():
    absurd = {"decode_bytes_per_s": 1, "prefill_bytes_per_s": 1, "layer_us": 1 << 60, "stage_us": 1 << 60}
    nodes = tuple(
        machine(name, 500 * MB, **(absurd if odd else {"decode_bytes_per_s": 1 << 62}))
        for name, odd in (("a", True), ("b", False), ("c", True))
    )
    links = (LinkInventory("a", "b", rtt_us=1 << 60, bytes_per_s=1), LinkInventory("b", "a", -5, -5))
    plan = make_plan(demand(context=256), footprint(), Inventory(nodes, links))
    assert 0 < plan.prediction.token_us < 1 << 63
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def test_a_pair_that_does_not_reach_each_other_is_no_hop():
    nodes = inventory(500 * MB, 500 * MB).nodes
    pace = pace_of(footprint(), 256, "q8_0", nodes, ("a", (LinkInventory("a", "b", reachable=False),)))
    assert (pace.hop(0, 1), pace.hop(1, 0) < NEVER) == (NEVER, True)


def test_a_mixture_of_experts_reads_less_than_it_weighs():
    layers = [LayerFootprint(100 * MB, 0, read_bytes=10 * MB)] * 8
    node = (machine("a", 2000 * MB, decode_bytes_per_s=10**9, stage_us=1),)
    plan = make_plan(demand(context=256), footprint(layers), Inventory(node))
    assert plan.prediction.compute_us == (80 * MB + 40 * MB) // 1000 + 1
    assert plan.stages[0].weight_bytes == 800 * MB
