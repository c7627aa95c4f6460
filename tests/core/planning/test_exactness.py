"""The search against every placement there is, and its own bars."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.core.planning import Inventory, Plan, Shortfall, make_plan
from meshnode.core.planning.context import costs_of
from meshnode.core.planning.cuts import cuts_of
from meshnode.errors import ConfigError
from tests.core.planning.brute_force import best_of_all, problem
from tests.core.planning.models import MB, demand, footprint, inventory


def compare(seed, nodes, layers):
    asked, model, machines = problem(random.Random(seed), nodes, layers)
    try:
        found = make_plan(asked, model, machines)
    except ConfigError:
        assert asked.cuts  # random cuts that this model does not allow
        return "refused"
    best = best_of_all(asked, model, machines)
    if isinstance(found, Shortfall):
        assert best is None, (seed, found.reason, best)
        return found.reason
    assert [(stage.node, stage.first, stage.last) for stage in found.stages] == best, seed
    check(found, model)
    return len(found.stages)


def check(plan, model):
    """What every plan must hold: contiguous, allowed, within the memory of each node, each node once."""
    allowed = cuts_of(model)
    assert [stage.first for stage in plan.stages] == [0, *(stage.last for stage in plan.stages[:-1])]
    assert plan.stages[-1].last == len(model.layers)
    assert len(set(plan.nodes)) == len(plan.nodes)
    for stage in plan.stages:
        assert stage.last in allowed.ends[stage.first]
        assert stage.total_bytes <= stage.usable_bytes


def test_the_plan_is_the_best_of_all_placements_on_up_to_5_nodes_and_10_layers():
    outcomes = {compare(seed, 5, 10) for seed in range(300)}
    assert outcomes >= {1, 2, 3, "memory", "links"}  # the cases are not all of one kind


def test_the_plan_is_the_best_of_all_placements_on_up_to_8_nodes_and_8_layers():
    assert len({compare(seed, 8, 8) for seed in range(10)}) > 1


@pytest.mark.slow
@pytest.mark.parametrize(("cases", "nodes", "layers"), [(10_000, 5, 10), (200, 8, 8)])
def test_the_plan_is_the_best_of_all_placements_in_every_case(cases, nodes, layers):
    outcomes = [compare(seed, nodes, layers) for seed in range(cases)]
    print({outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes), key=str)})
    assert len(outcomes) == cases


@settings(max_examples=60, deadline=None, derandomize=True)
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


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_any_order_of_nodes_and_links_gives_the_same_bytes(seed, shuffle):
    _, model, machines = problem(random.Random(seed), 12, 8)
    nodes, links = list(machines.nodes), list(machines.links)
    first = make_plan(demand(author="b"), model, machines)
    shuffle.shuffle(nodes)
    shuffle.shuffle(links)
    again = make_plan(demand(author="b"), model, Inventory(tuple(nodes), tuple(links)))
    assert msgspec.msgpack.encode(again) == msgspec.msgpack.encode(first)
