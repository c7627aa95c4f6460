from sim import report


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
