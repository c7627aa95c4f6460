from meshnode.core.planning import LayerFootprint, Plan, Shortfall, make_plan
from meshnode.core.planning.context import cells
from meshnode.core.planning.inventory import offered_bytes
from tests.core.planning.models import MB, RESERVE, demand, footprint, inventory

PER_TOKEN = 1024 // 32 * 34  # bytes a layer keeps for one token: 1024 values in q8_0


def context_of(asked, model, *rooms):
    return make_plan(demand(context=asked), model, inventory(*rooms)).context


def test_r34_a_stage_pays_for_the_cache_of_its_own_layers_only():
    plan = make_plan(demand(context=4096), footprint(8), inventory(500 * MB, 500 * MB))
    assert [stage.kv_bytes for stage in plan.stages] == [4 * 4096 * PER_TOKEN] * 2


def test_r35_a_whole_model_on_one_node_pays_for_all_layers_whatever_else_is_in_the_mesh():
    plan = make_plan(demand(context=4096), footprint(8), inventory(2000 * MB, 2000 * MB))
    assert [stage.kv_bytes for stage in plan.stages] == [8 * 4096 * PER_TOKEN]


def test_r36_automatic_context_is_what_the_memory_leaves_in_whole_cells_and_never_a_fallback():
    weights = 8 * 100 * MB + 70 * MB
    assert context_of(0, footprint(trained=100_000), weights + 8 * 20_000 * PER_TOKEN) == 19_968
    assert context_of(0, footprint(trained=100_000), weights + 8 * 5_000 * PER_TOKEN) == 4864


def test_r36_automatic_context_is_capped_by_the_trained_one_also_where_that_is_no_whole_grain():
    assert context_of(0, footprint(trained=2048), 9000 * MB) == 2048
    plan = make_plan(demand(), footprint(trained=1000), inventory(9000 * MB))
    assert plan.context == 1000
    assert plan.stages[0].kv_bytes == 8 * 1024 * PER_TOKEN


def test_r37_the_smallest_stage_decides_for_a_split():
    plan = make_plan(demand(), footprint(8, trained=100_000), inventory(540 * MB, 520 * MB))
    assert len(plan.stages) == 2
    rooms = [stage.usable_bytes - (stage.total_bytes - stage.kv_bytes) for stage in plan.stages]
    budgets = [room // (stage.layers * PER_TOKEN) for room, stage in zip(rooms, plan.stages, strict=True)]
    assert plan.context == min(budgets) // 256 * 256


def test_r44_zero_is_automatic_and_a_positive_value_is_planned_exactly():
    roomy = inventory(9000 * MB)
    assert make_plan(demand(context=0), footprint(), roomy) == make_plan(demand(), footprint(), roomy)
    plan = make_plan(demand(context=1000), footprint(), roomy)
    assert (plan.context, plan.stages[0].kv_bytes) == (1000, 8 * cells(1000) * PER_TOKEN)


def test_r39_the_users_kv_type_is_what_is_counted():
    for kv_type, block in (("f16", 64), ("q8_0", 34), ("q4_0", 18), ("f32", 128)):
        plan = make_plan(demand(context=1024, kv_type=kv_type), footprint(), inventory(9000 * MB))
        assert plan.kv_type == kv_type
        assert plan.stages[0].kv_bytes == 8 * 1024 * 1024 // 32 * block


def test_r42_lanes_do_not_multiply_kv_bytes_and_r43_default_to_four():
    plans = [make_plan(demand(lanes=lanes, context=1024), footprint(), inventory(9000 * MB)) for lanes in (0, 1, 64)]
    assert [plan.lanes for plan in plans] == [4, 1, 64]
    assert len({plan.stages[0].kv_bytes for plan in plans}) == 1


def test_r43_automatic_lanes_give_way_to_context_where_each_costs_recurrent_state():
    layers = [LayerFootprint(100 * MB, 1024, state_bytes=10 * MB)] * 8
    model = footprint(layers, trained=8192)
    room = 870 * MB + 8 * 8192 * PER_TOKEN
    plan = make_plan(demand(), model, inventory(room + 2 * 80 * MB))
    assert (plan.context, plan.lanes, plan.stages[0].state_bytes) == (8192, 2, 160 * MB)
    exact = make_plan(demand(lanes=4, context=8192), model, inventory(room + 2 * 80 * MB))
    assert isinstance(exact, Shortfall)
    assert exact.lanes == 4


def test_automatic_mode_takes_more_nodes_until_a_comfortable_context_fits_and_no_more():
    short = 870 * MB + 8 * 4096 * PER_TOKEN
    model = footprint(8, trained=32_768)
    assert len(make_plan(demand(), model, inventory(short, short)).stages) == 2
    assert len(make_plan(demand(), model, inventory(short)).stages) == 1
    enough = 870 * MB + 8 * 8192 * PER_TOKEN
    assert len(make_plan(demand(), model, inventory(enough, enough)).stages) == 1


def test_less_than_the_smallest_useful_context_is_a_shortfall():
    found = make_plan(demand(), footprint(), inventory(870 * MB + 8 * 500 * PER_TOKEN))
    assert isinstance(found, Shortfall)
    assert found.context == 512


def test_memory_that_a_person_set_is_used_whole_and_measured_memory_keeps_headroom():
    assert offered_bytes(10**10, 3 * 10**9) == 3 * 10**9
    assert offered_bytes(10**10, None) == 85 * 10**8 // (64 << 20) * (64 << 20)
    exact = 870 * MB + 8 * 512 * PER_TOKEN
    assert isinstance(make_plan(demand(context=512), footprint(), inventory(exact)), Plan)
    assert isinstance(make_plan(demand(context=512), footprint(), inventory(exact - 1)), Shortfall)


def test_every_stage_keeps_its_reserve():
    plan = make_plan(demand(), footprint(), inventory(500 * MB, 500 * MB))
    assert [stage.reserve_bytes for stage in plan.stages] == [RESERVE] * 2
