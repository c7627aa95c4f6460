"""The search against every placement there is; `python -m tests.core.planning.brute_force` compares more."""

import random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.core.planning import Inventory, Plan, make_plan
from meshnode.core.planning.context import costs_of
from tests.core.planning.brute_force import check, compare, problem
from tests.core.planning.models import MB, demand, footprint, inventory


def test_the_plan_is_the_best_of_all_placements_on_up_to_5_nodes_and_10_layers():
    outcomes = {compare(seed, 5, 10) for seed in range(300)}
    assert outcomes >= {1, 2, 3, "memory", "links"}  # the cases are not all of one kind


def test_the_plan_is_the_best_of_all_placements_on_up_to_8_nodes_and_8_layers():
    assert len({compare(seed, 8, 8) for seed in range(10)}) > 1


@settings(max_examples=40, derandomize=True)
@given(
    st.lists(st.integers(150, 900), min_size=9, max_size=20),
    st.integers(20, 60),
    st.integers(0, 8192),
    st.sampled_from(["", "f16", "q4_0"]),
)
def test_large_plans_keep_memory_and_cuts_and_miss_none_that_counting_layers_shows(rooms, layers, context, kv_type):
    model = footprint(layers)
    machines = inventory(*[room * MB for room in rooms], names=[f"n{index:02}" for index in range(20)])
    asked = demand(author="n03", context=context, kv_type=kv_type)
    found = make_plan(asked, model, machines)
    if isinstance(found, Plan):
        check(found, model)
        return
    costs = costs_of(model, found.context, 4, found.kv_type)
    each = costs.prefix[1]
    fits = sum((room * MB) // each for room in rooms)
    ends = -(-costs.embedding // each) + -(-costs.output // each)
    assert fits - ends < layers


@settings(max_examples=60, derandomize=True)
@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_any_order_of_nodes_and_links_gives_the_same_bytes(seed, shuffle):
    _, model, machines = problem(random.Random(seed), 12, 8)
    nodes, links = list(machines.nodes), list(machines.links)
    first = make_plan(demand(author="b"), model, machines)
    shuffle.shuffle(nodes)
    shuffle.shuffle(links)
    again = make_plan(demand(author="b"), model, Inventory(tuple(nodes), tuple(links)))
    assert msgspec.msgpack.encode(again) == msgspec.msgpack.encode(first)
