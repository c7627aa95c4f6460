import itertools
import random

import msgspec
import pytest

from meshnode.core.planning import Inventory, LayerFootprint, Plan, Shortfall, make_plan
from meshnode.errors import ConfigError, ModelError
from tests.core.planning.models import MB, RESERVE, archived, demand, footprint, inventory

KV_1024 = 1024 // 32 * 34  # bytes a token of 1024 values in q8_0


def cuts(plan):
    return [(stage.node, stage.first, stage.last) for stage in plan.stages]


def test_one_node_that_holds_the_model_beats_any_split_and_the_author_comes_first():
    plan = make_plan(demand(author="b"), footprint(), inventory(9000 * MB, 1000 * MB, 9000 * MB))
    assert cuts(plan) == [("b", 0, 8)]
    assert plan.coordinator == "b"


def test_without_the_author_more_memory_then_the_lower_id_wins():
    small, large = 1000 * MB, 2000 * MB
    assert cuts(make_plan(demand(author="z"), footprint(), archived(inventory(small, large, large)))) == [("b", 0, 8)]


def test_without_the_author_a_node_that_has_the_bytes_comes_before_one_with_more_memory():
    names = ("embedding", "output", "shared", *(f"layer.{index}" for index in range(8)))
    nodes = list(inventory(1000 * MB, 2000 * MB).nodes)
    nodes[0] = msgspec.structs.replace(nodes[0], cached={"d" * 64: names})
    assert cuts(make_plan(demand(author="z"), footprint(), Inventory(tuple(nodes)))) == [("a", 0, 8)]


def test_the_fewest_of_equally_fast_nodes_are_taken_and_the_slowest_stage_is_as_fast_as_can_be():
    plan = make_plan(demand(context=256), footprint(12), inventory(450 * MB, 900 * MB, 100 * MB, 90 * MB))
    # The output matrix is read by the last stage: with the small node there, eight layers are the slowest stage.
    assert [(node, last - first) for node, first, last in cuts(plan)] == [("b", 8), ("a", 4)]


def test_the_author_takes_part_in_a_split_among_equals_because_it_need_not_fetch():
    plan = make_plan(demand(author="c", context=256), footprint(12), inventory(*[700 * MB] * 3))
    # The other one begins: the embedding that it fetches is smaller than the output matrix.
    assert [node for node, _, _ in cuts(plan)] == ["a", "c"]


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
    assert plan.digest == "dabdb27f8faeb67cf949bbcdff8069077cd747541617e7aabb8bfb2cec4cdfe9"


def test_r66_participants_are_told_apart_by_their_whole_id():
    nodes = inventory(2000 * MB, 1000 * MB, names=("n10", "n1"))
    assert cuts(make_plan(demand(author="n1"), footprint(), nodes)) == [("n1", 0, 8)]
    assert cuts(make_plan(demand(author="n1", pins=("n1",)), footprint(), nodes)) == [("n1", 0, 8)]


def test_an_absent_author_leaves_the_first_stage_as_coordinator():
    assert make_plan(demand(author="z"), footprint(), archived(inventory(500 * MB, 500 * MB))).coordinator == "a"


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
