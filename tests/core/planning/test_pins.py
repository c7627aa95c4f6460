"""What a person set is planned exactly, or refused with a reason."""

import msgspec
import pytest

from meshnode.core.planning import Inventory, Shortfall, make_plan
from meshnode.errors import ConfigError
from tests.core.planning.models import MB, archived, demand, footprint, inventory


def test_excluded_nodes_take_no_layers_and_are_listed_with_the_reason():
    machines = inventory(2000 * MB, 1900 * MB)
    assert make_plan(demand(excludes=("a",)), footprint(), machines).nodes == ("b",)
    found = make_plan(demand(excludes=("a", "b")), footprint(), machines)
    assert {item.reason for item in found.excluded} == {"excluded_by_user"}
    assert found.reason == "no_nodes"


def test_an_author_that_takes_no_layers_stays_the_coordinator():
    assert make_plan(demand(excludes=("a",)), footprint(), inventory(2000 * MB, 1900 * MB)).coordinator == "a"
    assert make_plan(demand(), footprint(), inventory(1 * MB, 1900 * MB)).coordinator == "a"


def test_cuts_are_planned_exactly_although_one_node_would_do():
    plan = make_plan(demand(cuts=(2, 5)), footprint(), inventory(*[2000 * MB] * 4))
    assert [(stage.first, stage.last) for stage in plan.stages] == [(0, 2), (2, 5), (5, 8)]
    assert plan.prediction.single is None


def test_cuts_that_do_not_fit_the_nodes_are_a_shortfall():
    found = make_plan(demand(cuts=(7,), context=256), footprint(), inventory(500 * MB, 500 * MB))
    assert isinstance(found, Shortfall)
    assert found.reason == "cuts"


@pytest.mark.parametrize(
    ("cuts", "model", "words", "hint"),
    [
        ((8,), {}, "not ascending layers", "1 to 7"),
        ((5, 2), {}, "not ascending layers", "1 to 7"),
        ((0,), {}, "not ascending layers", "1 to 7"),
        ((3,), {"boundaries": (2, 4, 6)}, "layers 0 to 2", "2, 4, 6"),
        ((4,), {"forbidden_lengths": (4,)}, "layers 0 to 3", "1 to 7"),
        ((4,), {"whole_only": "it is looped"}, "cannot be cut: it is looped", "--cuts"),
    ],
)
def test_cuts_that_the_architecture_does_not_allow_are_the_users_error_and_say_what_is_allowed(
    cuts, model, words, hint
):
    with pytest.raises(ConfigError, match=words) as error:
        make_plan(demand(cuts=cuts), footprint(**model), inventory(2000 * MB))
    assert hint in error.value.hint


def test_an_impossible_number_of_replicas_is_refused():
    with pytest.raises(ConfigError, match="17 replicas"):
        make_plan(demand(replicas=17), footprint(), inventory(2000 * MB))


def test_the_author_keeps_the_head_while_it_takes_part_in_the_mesh_and_gives_it_up_when_it_leaves():
    nodes = inventory(2000 * MB, 1900 * MB).nodes

    def coordinator(reason):
        author = msgspec.structs.replace(nodes[0], excluded=reason)
        return make_plan(demand(), footprint(), archived(Inventory((author, nodes[1])))).coordinator

    assert [coordinator(reason) for reason in ("", "failed", "refused")] == ["a", "a", "a"]
    assert [coordinator(reason) for reason in ("draining", "unreachable")] == ["b", "b"]
