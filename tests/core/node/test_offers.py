from __future__ import annotations

import msgspec
import pytest

from meshnode.core.membership.announcement import BODY_BYTES, COORDINATED, WAYS, Body, Reserved, Served, Speed, Way
from meshnode.core.node import announcing
from meshnode.core.node import events as on
from meshnode.core.node.offers import links_of, speed_of
from meshnode.core.planning.inventory import LinkInventory
from meshnode.identity.ids import node_id_of
from meshnode.wire.fence import Term, run_id
from tests.core.node.mesh import MESH, World, name_to_id

A, B, C = (name_to_id(name) for name in "abc")
SPEEDS = {"q8_0": Speed(20_123_456_789, 80_000_000_000, 7, 612), "q4_k": Speed(1), "f16": Speed(2)}


def world() -> World:
    mesh = World()
    for name in "abc":
        mesh.add(name, 500)
    mesh.meet("a", "b", "c")
    mesh.run(3)
    return mesh


def test_what_a_node_measured_is_in_every_other_nodes_inventory_with_two_figures() -> None:
    mesh = world()
    mesh.hand("b", on.Measured(SPEEDS, {A: Way(512, 117_654_321)}))
    mesh.run(3)
    for name in "abc":
        inventory = mesh.nodes[name].inventory("", "q8_0")
        seen = next(node for node in inventory.nodes if node.node == B)
        assert (seen.decode_bytes_per_s, seen.prefill_bytes_per_s, seen.layer_us) == (20_000_000_000, 80_000_000_000, 7)
        assert LinkInventory(A, B, 510, 120_000_000) in inventory.links
        assert LinkInventory(B, A, 510, 0) in inventory.links, "a round trip is the same both ways"


def test_a_draining_node_is_left_out_of_plans_until_it_takes_work_again() -> None:
    mesh = world()
    for wanted, reason in ((True, "draining"), (False, "")):
        mesh.hand("a", on.DrainWanted(C, wanted))
        mesh.run(3)
        for name in "abc":
            found = {node.node: node.excluded for node in mesh.nodes[name].inventory("").nodes}
            assert found == {A: "", B: "", C: reason}


def test_a_kind_that_was_not_measured_is_like_one_that_was() -> None:
    assert speed_of(SPEEDS, "q5_k") == speed_of(SPEEDS, "iq3_s") == SPEEDS["q4_k"]
    assert speed_of(SPEEDS, "bf16") == SPEEDS["f16"]
    assert speed_of(SPEEDS, "") == speed_of({"q8_0": SPEEDS["q8_0"]}, "q4_k") == SPEEDS["q8_0"]
    assert speed_of({}, "q8_0") == Speed()


def test_ways_from_nodes_that_are_no_members_are_not_planned_with() -> None:
    assert links_of({A: {B: Way(5, 6), A: Way(1, 1)}}) == ()


def test_an_announcement_fits_however_many_models_are_served_and_peers_measured() -> None:
    served = tuple(
        Served(f"{number:016x}", "m" * 128, Term(9), run_id(bytes(8)), 4096, 1_800_000_000) for number in range(8)
    )
    ways = {node_id_of(bytes([number])): Way(90_000, 99_000_000_000) for number in range(30)}
    told = announcing.ways({node: Way(number, 5) for number, node in enumerate(ways)})
    assert [way.rtt_us for way in told.values()] == list(range(WAYS)), "the nearest"
    slices = {f"{number:064x}": tuple((2 * part, 2 * part + 1) for part in range(8)) for number in range(4)}
    full = Body(MESH, A, 1, 1, "n" * 63, ("[2001:db8::1]:65535",) * 8, 1 << 40, served=served, cached=slices, ways=ways)
    body = announcing.fitting(full)
    assert 0 < len(body.ways) < len(ways)
    assert len(msgspec.msgpack.encode(body)) < BODY_BYTES


@pytest.mark.parametrize("letter", ["\u6a21", "\U0001f600"])
def test_an_announcement_fits_whatever_the_models_are_called(letter: str) -> None:
    """What other people named may have 128 letters of up to four bytes."""
    served = tuple(
        Served(f"{number:016x}", letter * 128, Term(9), run_id(bytes(8)), 4096, 1_800_000_000) for number in range(8)
    )
    held = tuple(Reserved(f"{number:016x}", 1 << 40) for number in range(8))
    cared = tuple(f"{number:016x}" for number in range(COORDINATED))
    full = Body(MESH, A, 1, 1, "n" * 63, ("[2001:db8::1]:65535",) * 8, 1 << 40, served=served, reserved=held)
    body = announcing.fitting(msgspec.structs.replace(full, coordinates=cared))
    assert len(msgspec.msgpack.encode(body)) <= BODY_BYTES - announcing.ROOM
    assert body.served == served[: len(body.served)] != (), "as many models as there is room for"
    assert sum(each.bytes for each in body.reserved) == 8 << 40, "memory that is taken never looks free"
    assert body.coordinates == cared, "nobody takes over what is cared for here"


def test_rounding_keeps_two_figures_and_never_makes_nothing_of_something() -> None:
    assert [announcing.rounded(value) for value in (0, 1, 99, 100, 104, 105, 999, 123_456)] == [
        0, 1, 99, 100, 100, 110, 1000, 120_000,
    ]  # fmt: skip
