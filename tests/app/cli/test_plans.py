"""What people see of a plan."""

from __future__ import annotations

import msgspec
import pytest
from rich.console import Console

from meshnode.app.admin import PlanRequest
from meshnode.app.cli.plans import milliseconds, plan_view, rate
from meshnode.app.cli.tables import size
from meshnode.app.planning import answer
from meshnode.core.planning import Inventory, LayerFootprint, ModelFootprint, NodeInventory, Plan
from meshnode.errors import ConfigError
from meshnode.identity.ids import NodeId

MB = 1_000_000
MODEL = ModelFootprint(
    manifest_digest="0" * 64,
    name="tiny",
    architecture="llama",
    width=64,
    vocabulary=100,
    context_trained=2048,
    layers=tuple(LayerFootprint(weight_bytes=100 * MB, kv_values=64) for _ in range(4)),
    embedding_bytes=MB,
    output_bytes=MB,
    boundaries=(1, 2, 3),
)


def machines(*sizes: int, speeds: tuple[int, ...] = ()) -> Inventory:
    names = ("desk", "attic", "cellar")
    speeds = (*speeds, 0, 0, 0)
    nodes = [
        NodeInventory(NodeId(name), name, room * MB, decode_bytes_per_s=speed * 10**9)
        for name, room, speed in zip(names, sizes, speeds, strict=False)
    ]
    return Inventory(tuple(nodes))


def planned(inventory: Inventory, **asked: object) -> Plan:
    made = answer(PlanRequest(MODEL, **asked), inventory, NodeId("desk")).plan  # type: ignore[arg-type]
    assert made is not None
    return made


def drawn(plan: Plan, width: int = 120) -> str:
    console = Console(width=width, highlight=False, soft_wrap=True)
    with console.capture() as captured:
        console.print(plan_view(plan), soft_wrap=True)
    return " ".join(captured.get().split())


def test_a_plan_shows_every_stage_with_its_layers_its_room_and_its_times() -> None:
    plan = planned(machines(400, 400))
    text = drawn(plan)
    assert "2 stages" in text
    assert plan.prediction is not None
    for stage, time in zip(plan.stages, plan.prediction.stages, strict=True):
        assert f"{stage.first}-{stage.last - 1}" in text
        assert size(stage.total_bytes) in text
        assert f"{milliseconds(time.compute_us)} {milliseconds(time.wire_us)}" in text
    assert f"a token in {milliseconds(plan.prediction.token_us)}" in text
    assert "4 streams at once get at most" in text


def test_a_split_for_memory_says_so() -> None:
    assert "no single node has room for it" in drawn(planned(machines(400, 400)))


def test_one_node_says_why_nothing_is_split() -> None:
    text = drawn(planned(machines(900, 400), context=512))
    assert "not split: one node holds it" in text
    assert "streams at once" not in text


def test_a_split_that_pays_is_compared_with_the_best_single_node() -> None:
    text = drawn(planned(machines(900, 400, speeds=(1, 20))))
    assert "the best single node, desk, would take" in text
    assert "times as fast" in text
    assert "do NOT" not in text


def test_cuts_that_make_it_slower_say_not_to_split() -> None:
    text = drawn(planned(machines(900, 900, speeds=(10, 10)), cuts=(2,)))
    assert "do NOT split: the best single node, desk, would take" in text


def test_assumed_speeds_are_named() -> None:
    plan = planned(machines(400, 400, speeds=(10, 0)))
    assert "are assumed: attic" in drawn(plan)
    assert "assumed" not in drawn(planned(machines(900, speeds=(10,))))


def test_replicas_are_shown_one_after_the_other() -> None:
    text = drawn(planned(machines(900, 900), replicas=2))
    assert "replica 2" in text
    assert text.count("not split") == 2


def test_members_are_found_by_name_and_by_whole_id_and_a_stranger_is_an_error() -> None:
    inventory = machines(900, 900)
    inventory = Inventory((msgspec.structs.replace(inventory.nodes[0], node=NodeId("desk-id")), inventory.nodes[1]))
    for name in ("desk", "desk-id"):
        made = answer(PlanRequest(MODEL, only=(name,)), inventory, NodeId("desk-id")).plan
        assert made is not None
        assert made.nodes == ("desk-id",)
    with pytest.raises(ConfigError, match="'desk-i'") as error:
        answer(PlanRequest(MODEL, exclude=("desk-i",)), inventory, NodeId("desk-id"))
    assert "attic, desk" in error.value.hint


def test_times_are_told_with_what_a_person_compares() -> None:
    assert [milliseconds(us) for us in (0, 420, 13_520, 240_400)] == ["0.00 ms", "0.42 ms", "13.5 ms", "240 ms"]
    assert [rate(us) for us in (0, 40_000, 5_000)] == ["1000000", "25.0", "200"]
