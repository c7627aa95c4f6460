"""What a node says of itself, and what it does when somebody else says it too."""

from __future__ import annotations

import msgspec
import pytest

from meshnode.core.membership.announcement import Body, announce, fingerprint
from meshnode.core.membership.voice import CHANGE_S, COPIED_S, JITTER_S, REFRESH_S, SETTLE_S, Voice
from meshnode.core.node import events as on
from meshnode.errors import PeerError
from meshnode.wire.messages import Announce
from tests.core.node.mesh import MESH, HashAuthority, World, name_to_id

ME = HashAuthority(name_to_id("me"))


def body(incarnation: int = 1, sequence: int = 0) -> Body:
    return Body(MESH, ME.node, incarnation, sequence, "me", (), 0)


def copy(incarnation: int, sequence: int, *, alarm: bool = False) -> Announce:
    return announce(msgspec.structs.replace(body(incarnation, sequence), alarm=alarm), ME)


def voice(incarnation: int = 5) -> Voice:
    made = Voice(ME, incarnation, lambda size: b"\x80" * size, 0.0)
    made.speak(body(), 0.0)
    return made


def number(made: Voice) -> tuple[int, int]:
    assert made.body is not None
    return made.body.number


def test_each_announcement_has_the_next_number_and_names_the_certificate() -> None:
    made = voice()
    assert number(made) == (5, 1)
    made.speak(body(), 1.0)
    assert number(made) == (5, 2)
    assert made.body is not None
    assert made.body.certificate == fingerprint(ME.chain)


def test_without_change_it_is_repeated_about_every_minute() -> None:
    assert voice().due_at == pytest.approx(REFRESH_S - JITTER_S * 0x8080 / 65536)


def test_changes_travel_together_and_at_most_once_a_second() -> None:
    made = voice()
    made.soon(0.1)
    assert made.due_at == CHANGE_S
    made.soon(0.3)
    assert made.due_at == CHANGE_S, "a later change does not push it back"
    made.speak(body(), 1.0)
    made.soon(10.0)
    assert made.due_at == 10.0 + SETTLE_S


def test_its_own_words_and_older_ones_are_no_news() -> None:
    made = voice()
    assert made.record is not None
    for record in (made.record, copy(4, 99), copy(5, 0)):
        assert not made.heard_itself(record, 1.0, verify=True)
    assert made.alarm == ""


def test_a_restored_disk_goes_on_above_the_number_it_hears_of() -> None:
    made = voice()
    assert made.heard_itself(copy(9, 3), 10.0, verify=True)
    made.speak(body(), made.due_at)
    assert number(made) == (10, 1)
    assert made.alarm == ""


def test_a_node_that_is_outdone_twice_in_an_hour_has_a_copied_key() -> None:
    made = voice()
    made.heard_itself(copy(9, 3), 10.0, verify=True)
    made.speak(body(), 11.0)
    made.heard_itself(copy(11, 1), 60.0, verify=True)
    assert "copied" in made.alarm
    made.speak(body(), 61.0)
    assert number(made) == (12, 1)
    assert made.body is not None
    assert made.body.alarm
    told = copy(13, 1, alarm=True)
    assert not made.heard_itself(told, 70.0, verify=True), "two of them do not outdo each other for ever"


def test_a_copy_that_was_restarted_and_knows_nothing_is_told_again() -> None:
    made = voice()
    made.heard_itself(copy(5, 1), 10.0, verify=True)
    made.speak(body(), 11.0)
    assert made.heard_itself(copy(8, 1), 20.0, verify=True)
    made.speak(body(), 21.0)
    assert number(made) == (9, 1)
    assert made.body is not None
    assert made.body.alarm


def test_twice_in_two_hours_is_no_alarm() -> None:
    made = voice()
    made.heard_itself(copy(9, 3), 10.0, verify=True)
    made.heard_itself(copy(12, 3), 11.0 + COPIED_S, verify=True)
    assert made.alarm == ""


@pytest.mark.parametrize("sequence", [1, 7])
def test_another_voice_under_the_same_incarnation_is_a_copied_key(sequence: int) -> None:
    made = voice()
    assert made.heard_itself(copy(5, sequence), 1.0, verify=True)
    assert made.alarm
    made.speak(body(), 2.0)
    assert number(made) == (5, sequence + 1)


def test_nobody_else_can_raise_the_alarm() -> None:
    record = copy(9, 9)
    with pytest.raises(PeerError, match="wrong signature"):
        voice().heard_itself(Announce(record.author, record.body, b"\0" * 32), 1.0, verify=True)


def test_a_copied_key_keeps_both_out_of_plans_and_is_shown() -> None:
    world = World()
    for name in ("a", "b", "c"):
        world.add(name, 600)
    world.meet("a", "b", "c")
    world.run(2)
    target = name_to_id("c")
    other = announce(Body(MESH, target, 1, 1, "copy", ("x:1",), 100), HashAuthority(target))
    world.hand("a", on.Received(name_to_id("b"), other))
    world.run(1)
    assert [peer.state for peer in world.status("a").peers if peer.node == target] == ["conflict"]
    assert [node.excluded for node in world.nodes["a"].inventory("").nodes if node.node == target] == ["unreachable"]
