import itertools
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.core.planning import Inventory, LayerFootprint, Plan, Shortfall, make_plan
from meshnode.core.planning.context import costs_of
from meshnode.core.planning.cuts import cuts_of
from meshnode.errors import ConfigError, ModelError
from tests.core.planning.models import MB, RESERVE, demand, footprint, inventory

KV_1024 = 1024 // 32 * 34  # bytes a token of 1024 values in q8_0


def cuts(plan):
    return [(stage.node, stage.first, stage.last) for stage in plan.stages]


def test_one_node_that_holds_the_model_beats_any_split_and_the_author_comes_first():
    plan = make_plan(demand(author="b"), footprint(), inventory(9000 * MB, 1000 * MB, 9000 * MB))
    assert cuts(plan) == [("b", 0, 8)]
    assert plan.coordinator == "b"


def test_without_the_author_more_memory_then_the_lower_id_wins():
    small, large = 1000 * MB, 2000 * MB
    assert cuts(make_plan(demand(author="z"), footprint(), inventory(small, large, large))) == [("b", 0, 8)]


def test_without_the_author_a_node_that_has_the_bytes_comes_before_one_with_more_memory():
    names = ("embedding", "output", "shared", *(f"layer.{index}" for index in range(8)))
    nodes = list(inventory(1000 * MB, 2000 * MB).nodes)
    nodes[0] = msgspec.structs.replace(nodes[0], cached={"d" * 64: names})
    assert cuts(make_plan(demand(author="z"), footprint(), Inventory(tuple(nodes)))) == [("a", 0, 8)]


def test_the_fewest_nodes_take_layers_in_proportion_to_their_memory():
    plan = make_plan(demand(context=256), footprint(12), inventory(450 * MB, 900 * MB, 100 * MB, 90 * MB))
    assert [(node, last - first) for node, first, last in cuts(plan)] == [("a", 4), ("b", 8)]


def test_the_author_is_at_the_front_when_a_split_needs_it_not():
    plan = make_plan(demand(author="c", context=256), footprint(12), inventory(*[700 * MB] * 3))
    assert [node for node, _, _ in cuts(plan)] == ["c", "a"]


def test_embedding_is_counted_on_the_first_stage_and_output_on_the_last():
    plan = make_plan(demand(context=256), footprint(shared_bytes=7), inventory(500 * MB, 500 * MB))
    first, last = plan.stages
    assert (first.embedding_bytes, first.output_bytes) == (30 * MB, 0)
    assert (last.embedding_bytes, last.output_bytes) == (0, 40 * MB)
    assert first.weight_bytes == 400 * MB + 7
    assert first.total_bytes == 430 * MB + 7 + 4 * 256 * KV_1024 + RESERVE


def test_a_whole_tied_model_keeps_one_copy_of_its_embedding():
    tied = footprint(tied=True, output_bytes=30 * MB)
    plan = make_plan(demand(context=256), tied, inventory(830 * MB + 8 * 256 * KV_1024))
    assert plan.stages[0].total_bytes == 830 * MB + 8 * 256 * KV_1024 + RESERVE
    split = make_plan(demand(context=256), tied, inventory(500 * MB, 500 * MB))
    assert [stage.embedding_bytes + stage.output_bytes for stage in split.stages] == [30 * MB, 30 * MB]


def test_layers_stay_contiguous_and_whole():
    plan = make_plan(demand(), footprint(24), inventory(*[400 * MB] * 12))
    assert plan.stages[0].first == 0
    assert plan.stages[-1].last == 24
    assert all(before.last == after.first for before, after in itertools.pairwise(plan.stages))


def test_cuts_forbidden_lengths_and_kinds_are_kept():
    kinds = [LayerFootprint(100 * MB, 0, kind=index % 4 == 3) for index in range(12)]
    model = footprint(kinds, all_kinds_in_each_slice=True, forbidden_lengths=(5, 7), boundaries=tuple(range(2, 11)))
    plan = make_plan(demand(context=256), model, inventory(*[660 * MB] * 2))
    for stage in plan.stages:
        assert stage.last - stage.first not in (5, 7)
        assert any(index % 4 == 3 for index in range(stage.first, stage.last))
        assert any(index % 4 != 3 for index in range(stage.first, stage.last))


def test_a_model_that_must_stay_whole_is_never_cut():
    model = footprint(whole_only="its layer count chooses behaviour")
    assert cuts(make_plan(demand(), model, inventory(*[500 * MB] * 2, 1000 * MB))) == [("c", 0, 8)]
    assert isinstance(make_plan(demand(), model, inventory(*[500 * MB] * 4)), Shortfall)


def test_an_order_that_only_fits_backwards_is_found():
    # The heavy output fits only on the large node, the author's own place would be the first.
    model = footprint(output_bytes=700 * MB)
    plan = make_plan(demand(context=256), model, inventory(1010 * MB, 550 * MB))
    assert cuts(plan) == [("b", 0, 5), ("a", 5, 8)]


def test_r65_any_order_of_nodes_gives_the_same_bytes():
    machines = inventory(*[(350 + 13 * index) * MB for index in range(9)]).nodes
    plans = set()
    for seed in range(20):
        nodes = list(machines)
        random.Random(seed).shuffle(nodes)
        plans.add(msgspec.msgpack.encode(make_plan(demand(), footprint(24), Inventory(tuple(nodes)))))
    assert len(plans) == 1


def test_the_digest_of_a_plan_is_pinned():
    plan = make_plan(demand(context=256), footprint(), inventory(500 * MB, 500 * MB))
    assert plan.digest == "8534607ac56f627bb2e534fa6d67598dbfe91532b03443f42f1d8cb80739978c"


def test_r66_participants_are_told_apart_by_their_whole_id():
    nodes = inventory(2000 * MB, 1000 * MB, names=("n10", "n1"))
    assert cuts(make_plan(demand(author="n1"), footprint(), nodes)) == [("n1", 0, 8)]
    assert cuts(make_plan(demand(pins=("n1",)), footprint(), nodes)) == [("n1", 0, 8)]


def test_an_absent_author_leaves_the_first_stage_as_coordinator():
    assert make_plan(demand(author="z"), footprint(), inventory(500 * MB, 500 * MB)).coordinator == "a"


def test_r64_64_nodes_and_96_layers_are_planned():
    rooms = [(410 + index) * MB for index in range(64)]
    names = [f"n{index:02}" for index in range(64)]
    plan = make_plan(demand(author="n00"), footprint(96, weight=200 * MB), inventory(*rooms, names=names))
    assert isinstance(plan, Plan)
    assert all(stage.total_bytes <= stage.usable_bytes for stage in plan.stages)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"kv_type": "q5_1"}, "unknown KV type"),
        ({"context": -1}, "not possible"),
        ({"context": 8193}, "trained for 8192"),
        ({"lanes": 65}, "65 lanes"),
        ({"manifest_digest": "e" * 64}, "manifest"),
    ],
)
def test_r40_impossible_options_are_the_users_error_at_start(asked, words):
    with pytest.raises(ConfigError, match=words):
        make_plan(demand(**asked), footprint(), inventory(1000 * MB))


def test_a_model_without_quantized_kv_is_planned_with_f16_and_a_wish_for_more_is_refused():
    model = footprint(kv_type="f16", flash_attention=False)
    assert make_plan(demand(), model, inventory(2000 * MB)).kv_type == "f16"
    with pytest.raises(ConfigError, match="cannot use KV type q8_0"):
        make_plan(demand(kv_type="q8_0"), model, inventory(2000 * MB))


@pytest.mark.parametrize(
    "damage",
    [
        {"layers": ()},
        {"layers": (LayerFootprint(0, 1),)},
        {"layers": (LayerFootprint(1, -1),)},
        {"layers": (LayerFootprint(1, 1 << 25),)},
        {"layers": (LayerFootprint(1, 1, state_bytes=1 << 41),)},
        {"context_trained": 1 << 27},
        {"embedding_bytes": -1},
        {"shared_bytes": 1 << 60},
        {"boundaries": (0,)},
        {"boundaries": (8,)},
        {"tied": True, "output_bytes": 1},
        {"context_trained": 0},
    ],
)
def test_r45_a_footprint_with_unknown_or_impossible_sizes_is_an_error_not_a_plan(damage):
    with pytest.raises(ModelError):
        make_plan(demand(), msgspec.structs.replace(footprint(), **damage), inventory(1000 * MB))


def test_the_largest_numbers_that_are_let_in_still_travel():
    model = footprint([LayerFootprint(1 << 50, 1 << 24, state_bytes=1 << 40)] * 512, trained=1 << 26)
    found = make_plan(demand(context=1 << 26, lanes=64, kv_type="f32"), model, inventory(1000 * MB))
    assert msgspec.json.decode(msgspec.json.encode(found), type=Shortfall) == found


def test_a_node_listed_twice_is_refused():
    nodes = inventory(1000 * MB).nodes
    with pytest.raises(ValueError, match="twice"):
        make_plan(demand(), footprint(), Inventory(nodes * 2))


# --- against brute force ----------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    count = draw(st.integers(1, 6))
    layers = [
        LayerFootprint(draw(st.integers(1, 20)), draw(st.integers(0, 3)) * 32, kind=draw(st.integers(0, 1)))
        for _ in range(count)
    ]
    model = footprint(
        layers,
        trained=256,
        embedding_bytes=draw(st.integers(0, 15)),
        output_bytes=draw(st.integers(0, 15)),
        shared_bytes=draw(st.integers(0, 3)),
        boundaries=tuple(sorted(draw(st.sets(st.integers(1, count - 1))))) if count > 1 else (),
        forbidden_lengths=tuple(draw(st.sets(st.integers(1, 4), max_size=2))),
        all_kinds_in_each_slice=draw(st.booleans()),
    )
    # 256 tokens of 32 values in q8_0 are 8704 bytes: rooms around one to three layers' worth
    rooms = draw(st.lists(st.integers(1, 90), min_size=1, max_size=5))
    return model, inventory(*[room * 1000 for room in rooms]), draw(st.sampled_from("abz"))


def brute_force(model, nodes):
    """The fewest stages of any allowed placement: every order of every subset, every cut; None where there is none."""
    costs, allowed = costs_of(model, 256, 4, "q8_0"), cuts_of(model)
    count = len(model.layers)
    for stages in range(1, len(nodes) + 1):
        for order in itertools.permutations(nodes, stages):
            for inner in itertools.combinations(range(1, count), stages - 1):
                edges = list(itertools.pairwise((0, *inner, count)))
                if all(
                    last in allowed.ends[first] and costs.need(first, last) <= node.usable_bytes
                    for node, (first, last) in zip(order, edges, strict=True)
                ):
                    return stages
    return None


@settings(max_examples=400, deadline=None, derandomize=True)
@given(problems())
def test_a_plan_is_found_exactly_when_brute_force_finds_one_and_with_as_few_nodes(problem):
    model, machines, author = problem
    found = make_plan(demand(author=author, context=256), model, machines)
    fewest = brute_force(model, machines.nodes)
    if isinstance(found, Shortfall):
        assert fewest is None
        assert found.short_by_bytes > 0
    else:
        assert len(found.stages) == fewest
        check(found, model)


def check(plan, model):
    """What every plan must hold: contiguous, allowed, within the memory of each node, each node once."""
    allowed = cuts_of(model)
    assert [stage.first for stage in plan.stages] == [0, *(stage.last for stage in plan.stages[:-1])]
    assert plan.stages[-1].last == len(model.layers)
    assert len(set(plan.nodes)) == len(plan.nodes)
    for stage in plan.stages:
        assert stage.last in allowed.ends[stage.first]
        assert stage.total_bytes <= stage.usable_bytes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(150, 900), min_size=8, max_size=20),
    st.integers(20, 60),
    st.integers(0, 8192),
    st.sampled_from(["", "f16", "q4_0"]),
)
def test_large_plans_keep_memory_and_cuts_too(rooms, layers, context, kv_type):
    model = footprint(layers)
    machines = inventory(*[room * MB for room in rooms], names=[f"n{index:02}" for index in range(20)])
    found = make_plan(demand(author="n03", context=context, kv_type=kv_type), model, machines)
    if isinstance(found, Plan):
        check(found, model)
        again = make_plan(
            demand(author="n03", context=context, kv_type=kv_type), model, Inventory(machines.nodes[::-1])
        )
        assert again.digest == found.digest
    else:
        # Equal layers: the bounded search must not miss what counting whole layers shows to fit.
        costs = costs_of(model, found.context, 4, found.kv_type)
        each = costs.prefix[1]
        fits = sum((room * MB) // each for room in rooms)
        ends = -(-costs.embedding // each) + -(-costs.output // each)
        assert fits - ends < layers
