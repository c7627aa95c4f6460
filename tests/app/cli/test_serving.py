"""`load`, `unload`, `drain`, `cutover`: what is said before and after the node is asked (with a node: tests/e2e)."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from meshnode.app.admin import Cutover
from meshnode.app.cli import main
from meshnode.app.cli.serving import VERDICTS, cutover_lines
from meshnode.core.planning import (
    Demand,
    DeploymentId,
    Inventory,
    LayerFootprint,
    ModelFootprint,
    NodeInventory,
    Plan,
    Shortfall,
    make_plan,
)
from meshnode.identity.ids import NodeId

FOOTPRINT = ModelFootprint(
    manifest_digest="0" * 64,
    name="tiny",
    architecture="llama",
    width=64,
    vocabulary=1000,
    context_trained=1024,
    layers=tuple(LayerFootprint(100_000_000, 64) for _ in range(4)),
    embedding_bytes=1_000_000,
    output_bytes=1_000_000,
    boundaries=(1, 2, 3),
)


def made(*memory_mb: int) -> Plan | Shortfall:
    nodes = tuple(NodeInventory(NodeId(f"n{each}"), f"n{each}", each * 1_000_000) for each in memory_mb)
    demand = Demand(DeploymentId("d1"), 1, nodes[0].node, "0" * 64, "tiny", context=256, lanes=4)
    return make_plan(demand, FOOTPRINT, Inventory(nodes))


def plan(*memory_mb: int) -> Plan:
    found = made(*memory_mb)
    assert isinstance(found, Plan)
    return found


def ended(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    code = exit_.value.code
    return code if isinstance(code, int) else 0


def test_a_cut_over_is_told_stage_by_stage_with_its_times() -> None:
    lines = cutover_lines(Cutover("d1", "tiny", "replace", plan(400, 401), plan(900)))
    assert lines[0] == f"tiny (d1) {VERDICTS['replace']}"
    assert "now: n40" in lines[1]
    assert lines[2].startswith("  new: n900 0-3, ")
    assert "ms a token predicted" in lines[2]


def test_what_stays_is_told_once_and_a_shortfall_in_full() -> None:
    assert len(cutover_lines(Cutover("d1", "tiny", "keep", plan(900), plan(900)))) == 2
    shortfall = made(200)
    assert isinstance(shortfall, Shortfall)
    assert "short by" in cutover_lines(Cutover("d1", "tiny", "impossible", shortfall=shortfall))[1]


@pytest.mark.parametrize(
    "arguments",
    [("load", "m.gguf"), ("unload", "m"), ("drain",), ("drain", "attic", "--undo"), ("cutover", "--dry-run")],
)
def test_without_a_node_each_says_how_to_start_one(
    arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(*arguments, "--data", str(tmp_path)) == 2
    assert "no node is running" in capsys.readouterr().err


def test_impossible_cuts_and_a_cut_over_in_earnest_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended("load", "m.gguf", "--cuts", "9,4", "--data", str(tmp_path)) == 2
    assert "ascend" in capsys.readouterr().err
    assert ended("cutover", "--data", str(tmp_path)) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_verdicts_are_those_of_the_route() -> None:
    assert set(VERDICTS) == {"keep", "stay", "replace", "impossible", "none"}
    assert msgspec.json.decode(msgspec.json.encode(Cutover("d", "m", "keep")), type=Cutover).verdict in VERDICTS
