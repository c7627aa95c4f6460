import msgspec

from meshnode.core.planning import Inventory, make_plan
from meshnode.core.planning.hysteresis import better
from meshnode.core.planning.inventory import LinkInventory
from meshnode.core.planning.prediction import predicted
from tests.core.planning.models import MB, demand, footprint, inventory


def plan(token_us, *, context=8192, node="a", **changes):
    made = make_plan(demand(author=node), footprint(), inventory(2000 * MB, names=(node,)))
    prediction = msgspec.structs.replace(made.prediction, token_us=token_us)
    return msgspec.structs.replace(made, prediction=prediction, context=context, **changes)


def test_a_token_in_less_than_five_sixths_of_the_time_is_a_gain_and_just_that_is_none():
    assert better(plan(120_001), plan(100_000, node="b"))
    assert not better(plan(120_000), plan(100_000, node="b"))


def test_the_same_placement_is_no_gain_however_it_was_predicted():
    assert not better(plan(500_000), plan(100_000))


def test_a_faster_plan_that_has_too_little_context_or_fewer_lanes_is_no_gain():
    assert not better(plan(500_000), plan(100_000, node="b", context=4096))
    assert not better(plan(500_000), plan(100_000, node="b", lanes=2))
    assert better(plan(500_000, context=32768), plan(100_000, node="b", context=8192))  # as much as a chat needs


def test_a_fifth_more_context_is_a_gain_for_what_serves_with_too_little():
    assert better(plan(100_000, context=1024), plan(150_000, node="b", context=1280))
    assert not better(plan(100_000, context=8192), plan(150_000, node="b", context=32768))


def test_what_was_never_predicted_is_not_compared():
    assert not better(msgspec.structs.replace(plan(1), prediction=None), plan(1, node="b"))


def test_what_runs_is_predicted_anew_and_gone_where_a_node_is():
    machines = inventory(500 * MB, 500 * MB)
    running = make_plan(demand(), footprint(), machines)
    faster = tuple(msgspec.structs.replace(node, decode_bytes_per_s=10**12) for node in machines.nodes)
    again = predicted(running, footprint(), Inventory(faster))
    assert again.prediction.compute_us < running.prediction.compute_us
    assert again.digest == running.digest
    assert predicted(running, footprint(), machines).prediction.token_us == running.prediction.token_us
    assert predicted(running, footprint(), Inventory(machines.nodes[:1])) is None
    barred = LinkInventory(running.nodes[0], running.nodes[1], reachable=False)
    assert predicted(running, footprint(), Inventory(machines.nodes, (barred,))) is None
