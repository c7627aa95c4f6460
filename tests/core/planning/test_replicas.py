from meshnode.core.planning import Plan, Shortfall, make_plan
from tests.core.planning.models import MB, demand, footprint, inventory


def placed(plan):
    return [[(stage.node, stage.first, stage.last) for stage in one.stages] for one in (plan, *plan.replicas)]


def test_replicas_are_whole_models_on_nodes_of_their_own_with_equal_context():
    machines = inventory(2000 * MB, 1100 * MB, 1000 * MB)
    plan = make_plan(demand(replicas=2), footprint(), machines)
    assert placed(plan) == [[("a", 0, 8)], [("b", 0, 8)]]
    assert {one.context for one in (plan, *plan.replicas)} == {8192}
    three = make_plan(demand(replicas=3), footprint(trained=1 << 20), machines)
    assert len({(one.context, one.lanes) for one in (three, *three.replicas)}) == 1


def test_a_node_that_holds_it_alone_leaves_the_others_to_a_pipeline():
    plan = make_plan(demand(replicas=2, context=256), footprint(), inventory(2000 * MB, 500 * MB, 500 * MB))
    assert [len(stages) for stages in placed(plan)] == [1, 2]


def test_no_replica_is_planned_unless_it_is_asked_for():
    assert make_plan(demand(), footprint(), inventory(2000 * MB, 2000 * MB)).replicas == ()


def test_fewer_replicas_than_asked_for_are_a_shortfall_that_says_what_one_more_needs():
    found = make_plan(demand(replicas=3, context=256), footprint(), inventory(2000 * MB, 2000 * MB, 400 * MB))
    assert isinstance(found, Shortfall)
    assert (found.reason, found.detail) == ("replicas", "2 of 3")
    assert [item.node for item in found.participants] == ["c"]
    assert {item.node: item.reason for item in found.excluded} == {"a": "replica", "b": "replica"}
    assert any("2 of 3 fit" in line for line in found.lines())


def test_replicas_keep_the_cuts_that_were_asked_for():
    plan = make_plan(demand(replicas=2, cuts=(3,), context=256), footprint(), inventory(*[2000 * MB] * 4))
    assert isinstance(plan, Plan)
    assert [[last for _, _, last in stages] for stages in placed(plan)] == [[3, 8], [3, 8]]
