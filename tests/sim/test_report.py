import pytest

from meshnode.core.membership.rules import Rules
from meshnode.core.node.mediator import NodeRules
from sim import commands, report


def test_an_update_reaches_everybody_soon_and_a_lossy_link_only_delays_it() -> None:
    times = report.convergence(report.quiet(5, 0.05), 3)

    assert len(times) == 3
    assert all(0.02 <= seconds < 1.5 for seconds in times)


def test_a_power_off_is_noticed_by_all_and_takes_longer_than_a_ping() -> None:
    times = report.detection(report.quiet(4, 0.0), 1)

    assert len(times) == 3
    assert all(1.0 < seconds <= 10.0 for seconds in times)


def test_nobody_who_lives_is_taken_for_dead_for_a_pause_of_a_second() -> None:
    assert report.false_deaths(4, 30.0, 0.05, pause_s=1.0) == 0


def test_a_false_death_would_be_counted() -> None:
    assert report.false_deaths(4, 40.0, 0.0, pause_s=20.0) > 0


def test_a_quiet_mesh_sends_little_and_not_nothing() -> None:
    assert 100 < report.traffic(report.quiet(4, 0.0), 20.0) < 2000


def test_the_table_is_markdown_and_names_what_was_missed() -> None:
    rows = [report.Row("one", "1 s", "0.5 s", True), report.Row("two", "1 s", "2.0 s", False)]

    lines = report.table(rows).splitlines()

    assert len({len(line) for line in lines}) == 1
    assert "MISSED" not in lines[2]
    assert "MISSED" in lines[3]


def test_forgeries_are_counted_and_one_that_is_believed_would_be() -> None:
    told, believed = report.forgeries(100)
    assert told >= 100
    assert believed == 0
    assert report.forgeries(1, NodeRules(Rules(signatures=False)))[1] == 1


def test_groups_are_measured_by_name_one_row_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["report", "--only", "healing"]) == 0

    told = capsys.readouterr()
    assert [line.split("|")[2].strip() for line in told.out.splitlines()[2:]] == ["10 s", "10 s"]
    assert "rosters of 32 nodes equal" in told.err
