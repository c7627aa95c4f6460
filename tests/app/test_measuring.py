from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
import trio

from meshnode.app import measuring
from meshnode.app.measuring import KEPT_S, SPEED_FILE, Machine, machine_speed
from meshnode.app.speed_main import KINDS
from meshnode.core.membership.announcement import Speed
from meshnode.core.node.status import StageLoad
from meshnode.errors import StageLost
from meshnode.wire.stage_protocol import Statistics

SPEEDS = {"q8_0": Speed(10_000_000, 40_000_000, 100, 500)}


def machine(folder: Path, threads: int = 1) -> Machine:
    return Machine(threads, 8_000_000_000, folder)


def kept(folder: Path, at: float, identity: str) -> dict[str, Speed] | None:
    (folder / SPEED_FILE).write_bytes(msgspec.json.encode({"machine": identity, "at": at, "speeds": SPEEDS}))
    return measuring._read(folder / SPEED_FILE, machine(folder).identity)


@pytest.mark.native
async def test_a_child_measures_every_kind_and_leaves_no_file(tmp_path: Path) -> None:
    # Next to no memory: models of one layer, the shortest measurement there is.
    speeds = await machine_speed(Machine(1, 0, tmp_path))
    assert speeds.keys() == set(KINDS)
    for speed in speeds.values():
        assert speed.prefill_bytes_per_s > speed.decode_bytes_per_s > 1_000_000, "rows together are cheaper than alone"
        assert 0 <= speed.layer_us <= 200
        assert speed.stage_us > 0
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240 - an empty folder


async def test_a_child_that_cannot_measure_says_why_and_the_node_goes_on(tmp_path: Path) -> None:
    nowhere = Machine(1, 8_000_000_000, tmp_path / "missing")
    with pytest.raises(StageLost, match="missing"):
        await machine_speed(nowhere)


def test_what_was_measured_is_known_at_the_next_start_on_the_same_machine(tmp_path: Path) -> None:
    now = time.time()
    identity = machine(tmp_path).identity
    assert kept(tmp_path, now, identity) == SPEEDS
    assert kept(tmp_path, now, machine(tmp_path, threads=2).identity) is None
    assert kept(tmp_path, now - KEPT_S - 1, identity) is None
    assert kept(tmp_path, now + 3600, identity) is None, "a clock that was ahead would keep it for ever"


@pytest.mark.parametrize("content", [b"", b"{}", b"[1", b'{"machine": 1}'])
def test_a_damaged_file_is_measured_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / SPEED_FILE).write_bytes(content)
    assert measuring._read(tmp_path / SPEED_FILE, machine(tmp_path).identity) is None


def test_what_stages_take_replaces_what_was_measured_step_by_step() -> None:
    held = measuring._Slice("q8_0", weight_bytes=10_000_000, layers=10)
    speed = SPEEDS["q8_0"]
    for _ in range(40):
        speed = held.correct(speed, decode_us=501_000)
    assert speed.decode_bytes_per_s == pytest.approx(20_000_000, rel=0.01), "half a second beside the layers' own time"
    assert (speed.prefill_bytes_per_s, speed.layer_us, speed.stage_us) == (40_000_000, 100, 500)


async def test_the_load_of_a_stage_is_what_it_did_between_two_looks(autojump_clock) -> None:
    found = measuring.Measuring(None, None, None, None)
    found._look_at_loads({"r/0": Statistics(compute_us=5_000_000, rows=10, microbatches=10)})
    assert found.loads == {}
    await trio.sleep(10)
    found._look_at_loads(
        {
            "r/0": Statistics(compute_us=9_000_000, rows=26, microbatches=14),
            "r/1": Statistics(compute_us=1),
        }
    )
    assert found.loads == {"r/0": StageLoad(0.4, 4.0)}
    await trio.sleep(10)
    found._look_at_loads({"r/1": Statistics(compute_us=1)})
    assert found.loads == {"r/1": StageLoad(0.0, None)}
