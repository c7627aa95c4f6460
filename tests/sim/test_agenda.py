from sim.agenda import Agenda, stream


def test_what_is_due_at_one_time_happens_in_the_order_in_which_it_was_written_down() -> None:
    agenda, seen = Agenda(), []
    for name in ("a", "b", "c"):
        agenda.at(1.0, lambda name=name: seen.append(name))
    agenda.at(0.5, lambda: seen.append("first"))

    agenda.run(2.0)

    assert seen == ["first", "a", "b", "c"]
    assert agenda.now == 2.0


def test_nothing_happens_in_the_past() -> None:
    agenda, seen = Agenda(), []
    agenda.at(3.0, lambda: agenda.at(1.0, lambda: seen.append(agenda.now)))

    agenda.run(5.0)

    assert seen == [3.0]


def test_what_lies_behind_the_end_waits_for_the_next_run() -> None:
    agenda, seen = Agenda(), []
    agenda.after(2.0, lambda: seen.append(agenda.now))

    agenda.run(1.0)
    assert seen == []
    agenda.run(2.0)
    assert seen == [2.0]


def test_a_stream_depends_on_its_purpose_and_on_nothing_that_another_drew() -> None:
    one = [stream(1, "link", "a", "b").random() for _ in range(2)]

    assert one[0] == one[1]
    assert stream(1, "link", "b", "a").random() != one[0]
    assert stream(2, "link", "a", "b").random() != one[0]
