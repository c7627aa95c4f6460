"""`meshnode plan` as a whole command line, without a node."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from meshnode.app.admin import PlanAnswer
from meshnode.demo import MODEL
from tests.app.cli.test_commands import ended

HOME = """
[[machine]]
name = "desk"
memory = "153MB"
decode = "10GB"
[[machine]]
name = "attic"
memory = "153MB"
[[link]]
between = ["desk", "attic"]
rtt_ms = 4
"""


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MESHNODE_DATA", str(tmp_path / "data"))


@pytest.fixture
def home(tmp_path: Path) -> str:
    path = tmp_path / "home.toml"
    path.write_text(HOME)
    return str(path)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> PlanAnswer:
    code = ended("plan", str(MODEL), "--json", "--context", "512", *arguments)
    answer = msgspec.json.decode(capsys.readouterr().out, type=PlanAnswer)
    assert code == (0 if answer.plan is not None else 1)
    return answer


def test_machines_of_a_file_are_planned_with_their_speeds_and_distances(
    home: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, "--what-if", home).plan
    assert plan is not None
    assert plan.prediction is not None
    assert {stage.name: time.measured for stage, time in zip(plan.stages, plan.prediction.stages, strict=True)} == {
        "desk": True,
        "attic": False,
    }
    assert plan.prediction.wire_us + plan.prediction.return_us > 4000


def test_a_person_sees_times_and_the_comparison(home: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("plan", str(MODEL), "--context", "512", "--what-if", home) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "COMPUTE WIRE" in words
    assert "a token in" in words
    assert "no single node has room for it: this split is for memory" in words
    assert "are assumed: attic" in words


def test_cuts_replicas_and_who_may_take_part_are_planned_exactly(
    capsys: pytest.CaptureFixture[str],
) -> None:
    large = ("--memory", "1GB", "--memory", "1GB", "--memory", "1GB")
    cut = planned(capsys, *large, "--cuts", "2,5", "--exclude", "machine 2").plan
    assert cut is None  # three stages, two machines
    cut = planned(capsys, *large, "--cuts", "2", "--exclude", "machine 2").plan
    assert cut is not None
    assert ([stage.first for stage in cut.stages], "machine 2" in cut.nodes) == ([0, 2], False)
    assert cut.prediction is not None
    assert cut.prediction.single is not None
    only = planned(capsys, *large, "--only", "machine 3").plan
    assert only is not None
    assert only.nodes == ("machine 3",)
    twice = planned(capsys, *large, "--replicas", "2").plan
    assert twice is not None
    assert len(twice.replicas) == 1


def test_what_is_missing_is_told_on_stderr_with_exit_code_one(home: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("plan", str(MODEL), "--what-if", home, "--only", "desk") == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "short by" in told.err
    assert "attic: not used, is not among the nodes that were asked for" in told.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--what-if", "nowhere.toml"), "cannot be read"),
        (("--what-if", "HOME", "--memory", "1GB"), "both imagine machines"),
        (("--memory", "1GB", "--cuts", "99"), "not ascending layers"),
        (("--memory", "1GB", "--cuts", "b"), "is not a list of layers"),
        (("--memory", "1GB", "--only", "nobody"), "no machine is called 'nobody'"),
        (("--memory", "1GB", "--kv-type", "q5_1"), "q5_1"),
    ],
)
def test_what_cannot_be_planned_is_one_message_with_exit_code_two(
    arguments: tuple[str, ...], words: str, home: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [home if argument == "HOME" else argument for argument in arguments]
    assert ended("plan", str(MODEL), *given) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert told.out == ""
    assert 1 <= len(told.err.splitlines()) <= 4
