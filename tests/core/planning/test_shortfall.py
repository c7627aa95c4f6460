import re

import msgspec

from meshnode.core.planning import Inventory, Plan, Shortfall, make_plan
from meshnode.core.planning.inventory import LinkInventory
from meshnode.core.planning.shortfall import gigabytes
from tests.core.planning.models import MB, RESERVE, demand, footprint, inventory

KV_512 = 8 * 512 * 1024 // 32 * 34


def test_r61_the_numbers_are_what_is_required_available_and_missing():
    found = make_plan(demand(context=512), footprint(), inventory(300 * MB, 200 * MB))
    assert found.reason == "memory"
    assert found.required_bytes == 870 * MB + KV_512 + 2 * RESERVE
    assert found.available_bytes == 500 * MB + 2 * RESERVE
    assert found.short_by_bytes == 370 * MB + KV_512
    first, *nodes, advice = found.lines()
    assert first == (
        "model with a context of 512 tokens (q8_0) needs 1.17 GB, available over 2 nodes: 800.0 MB, short by 374.5 MB"
    )
    assert nodes == [
        "A: offers 450.0 MB, has 870.0 MB of the model, lacks 0.0 MB",
        "B: offers 350.0 MB, has 0.0 MB of the model, lacks 870.0 MB",
    ]
    assert advice.startswith("Add a node that offers ")


def test_the_node_that_is_advised_would_be_enough_and_one_step_less_would_not():
    nodes = inventory(300 * MB, 200 * MB).nodes
    found = make_plan(demand(context=512), footprint(), Inventory(nodes))
    size = round(float(re.search(r"offers ([0-9.]+) MB\.$", found.advice)[1])) * MB
    for extra, kind in ((size, Plan), (size - 10 * MB, Shortfall)):
        added = msgspec.structs.replace(nodes[0], node="new", usable_bytes=extra)
        assert isinstance(make_plan(demand(context=512), footprint(), Inventory((*nodes, added))), kind)


def test_a_shorter_context_and_a_smaller_kv_type_are_advised_where_they_would_do():
    room = 870 * MB + 8 * 4096 * 1024 // 32 * 18
    found = make_plan(demand(context=4096), footprint(), inventory(room))
    assert found.advice.startswith("Shorten the context to 2048 (--context 2048), or choose a smaller KV type")
    shorter = int(re.search(r"--context (\d+)", found.advice)[1])
    assert isinstance(make_plan(demand(context=shorter), footprint(), inventory(room)), Plan)
    assert isinstance(make_plan(demand(context=4096, kv_type="q4_0"), footprint(), inventory(room)), Plan)


def test_r61_cached_and_missing_bytes_of_each_participant_are_told():
    nodes = list(inventory(300 * MB, 200 * MB).nodes)
    nodes[1] = msgspec.structs.replace(nodes[1], cached={"d" * 64: ("layer.0", "layer.7", "output", "junk")})
    found = make_plan(demand(), footprint(), Inventory(tuple(nodes)))
    assert [(item.cached_bytes, item.missing_bytes) for item in found.participants] == [
        (870 * MB, 0),  # the author has the file
        (240 * MB, 630 * MB),
    ]


def test_r62_every_node_is_a_participant_or_excluded_with_its_reason():
    names = ("near", "tiny", "gone", "odd")
    nodes = list(inventory(300 * MB, 10 * MB, 900 * MB, 900 * MB, names=names).nodes)
    nodes[2] = msgspec.structs.replace(nodes[2], excluded="unreachable")
    nodes[3] = msgspec.structs.replace(nodes[3], excluded="eclipse")
    found = make_plan(demand(), footprint(), Inventory(tuple(nodes)))
    assert [item.node for item in found.participants] == ["near"]
    assert {item.node: item.reason for item in found.excluded} == {
        "tiny": "too_small",
        "gone": "unreachable",
        "odd": "eclipse",
    }
    assert "GONE: not used, cannot be reached (offers 1.05 GB)" in found.lines()
    pinned = make_plan(demand(pins=("tiny",)), footprint(), Inventory(tuple(nodes)))
    assert {item.reason for item in pinned.excluded} == {"not_pinned", "too_small", "unreachable", "eclipse"}
    assert pinned.reason == "no_nodes"


def test_no_node_at_all_is_a_shortfall_too():
    found = make_plan(demand(), footprint(), Inventory(()))
    assert (found.reason, found.available_bytes) == ("no_nodes", 0)
    assert found.short_by_bytes == found.required_bytes


def test_a_model_that_must_stay_whole_is_compared_with_the_largest_node_and_says_why():
    model = footprint(whole_only="its layer count chooses behaviour")
    found = make_plan(demand(context=512), model, inventory(700 * MB, 600 * MB))
    assert found.reason == "whole"
    assert found.short_by_bytes == 170 * MB + KV_512
    assert "This model must stay on one node: its layer count chooses behaviour." in found.lines()


def test_enough_in_all_but_no_cut_that_fits_says_so():
    found = make_plan(demand(context=512), footprint(boundaries=(4,)), inventory(600 * MB, 400 * MB))
    assert found.reason == "cuts"
    assert found.available_bytes > found.required_bytes
    assert found.short_by_bytes > 0
    assert "no cut that this architecture allows" in found.text()


def test_r63_a_plan_is_the_same_whether_or_not_a_shortfall_was_explained_before():
    machines = inventory(500 * MB, 500 * MB)
    before = make_plan(demand(), footprint(), machines)
    make_plan(demand(), footprint(weight=900 * MB), machines)
    assert make_plan(demand(), footprint(), machines) == before


def test_r61_sizes_are_decimal():
    assert [gigabytes(size) for size in (0, 1, 999_900_000, 10**9, 12_345_678_901)] == [
        "0.0 MB",
        "0.1 MB",
        "999.9 MB",
        "1.00 GB",
        "12.35 GB",
    ]


def test_a_shortfall_travels_as_json():
    found = make_plan(demand(), footprint(), inventory(300 * MB))
    assert msgspec.json.decode(msgspec.json.encode(found), type=Shortfall) == found


def test_layers_that_nobody_has_while_their_author_is_away_are_told_by_number():
    nodes = list(inventory(900 * MB, 900 * MB).nodes)
    nodes[0] = msgspec.structs.replace(nodes[0], cached={"d" * 64: ("layer.0", "layer.1", "layer.4")})
    nodes[1] = msgspec.structs.replace(nodes[1], cached={"d" * 64: ("layer.6",), "e" * 64: ("layer.3",)})
    found = make_plan(demand(author="z"), footprint(), Inventory(tuple(nodes)))
    assert (found.reason, found.detail) == ("artifacts", "2-3, 5, 7")
    assert any("nobody else has these of its layers: 2-3, 5, 7" in line for line in found.lines())
    assert "Start the node that has the file" in found.advice


def test_layers_of_a_node_that_leaves_can_still_be_fetched_and_those_of_one_that_is_gone_cannot():
    nodes = inventory(900 * MB).nodes
    everything = {"d" * 64: tuple(f"layer.{index}" for index in range(8))}
    holder = msgspec.structs.replace(nodes[0], node="h", cached=everything, excluded="draining")
    assert isinstance(make_plan(demand(author="z"), footprint(), Inventory((*nodes, holder))), Plan)
    gone = msgspec.structs.replace(holder, excluded="unreachable")
    assert make_plan(demand(author="z"), footprint(), Inventory((*nodes, gone))).reason == "artifacts"


def test_nodes_that_would_be_enough_but_do_not_reach_each_other_are_told_so():
    nodes = inventory(500 * MB, 500 * MB).nodes
    barred = tuple(LinkInventory(a, b, reachable=False) for a, b in (("a", "b"), ("b", "a")))
    found = make_plan(demand(context=256), footprint(), Inventory(nodes, barred))
    assert (found.reason, found.short_by_bytes) == ("links", 0)
    assert "short by" not in found.lines()[0]
    assert "do not reach each other" in found.text()


def test_r61_the_round_trip_to_each_participant_is_told():
    nodes = inventory(300 * MB, 200 * MB).nodes
    links = (LinkInventory("a", "b", rtt_us=2500), LinkInventory("b", "a", rtt_us=2400))
    found = make_plan(demand(context=512), footprint(), Inventory(nodes, links))
    assert [item.rtt_us for item in found.participants] == [0, 2400]
    assert "2.4 ms away" in found.lines()[2]


def test_machines_that_are_away_and_said_before_that_they_have_missing_layers_are_named():
    here, some, most, stranger = inventory(900 * MB, 900 * MB, 900 * MB, 900 * MB).nodes
    layers = {"d" * 64: tuple(f"layer.{index}" for index in (1, 2, 3))}
    few = {"d" * 64: ("layer.3", "layer.7"), "e" * 64: ("layer.0",)}
    nodes = (
        msgspec.structs.replace(here, cached={"d" * 64: tuple(f"layer.{index}" for index in (0, 4, 5, 6, 7))}),
        msgspec.structs.replace(some, cached=few, excluded="unreachable"),
        msgspec.structs.replace(most, cached=layers, excluded="left"),
        msgspec.structs.replace(stranger, cached={"e" * 64: ("layer.1",)}, excluded="unreachable"),
    )
    found = make_plan(demand(author="z"), footprint(), Inventory(nodes))
    assert (found.reason, found.detail) == ("artifacts", "1-3")
    assert found.advice == (
        "Switch on C, which has all of them; or B, which has 3; or `meshnode serve` the same file on another."
    )
    assert make_plan(demand(author="z"), footprint(), Inventory(nodes[::-1])) == found
    owner = make_plan(demand(author="d"), footprint(), Inventory(nodes))
    assert owner.advice.startswith("Switch on C, which has all of them; or D, which has all of them"), "it has the file"
