from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.membership import roster as module
from meshnode.core.membership.announcement import Body, announce
from meshnode.core.membership.roster import FORGET_S, Entry, Roster
from meshnode.errors import PeerError
from meshnode.identity.ids import NodeId
from meshnode.wire.limits import ANNOUNCEMENT_TTL_MS
from meshnode.wire.messages import Announce
from tests.core.node.mesh import MESH, HashAuthority, name_to_id

TTL_S = ANNOUNCEMENT_TTL_MS / 1000
NAMES = ("a", "b", "c")
Number = tuple[str, int, int]
numbers = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 3), st.integers(0, 3)), max_size=12)


def record(name: str, incarnation: int = 1, sequence: int = 1, *, left: bool = False) -> Announce:
    node = name_to_id(name)
    text = f"{name} {incarnation}.{sequence}"
    body = Body(MESH, node, incarnation, sequence, text, (f"{name}:1",), 100, left=left)
    return announce(body, HashAuthority(node))


def roster(own: str = "me") -> Roster:
    made = Roster(HashAuthority(name_to_id(own)))
    for name in sorted({*NAMES, own}):
        made.introduce(HashAuthority(name_to_id(name)).chain)
    return made


def merged(*parts: list[Number]) -> dict[NodeId, Entry]:
    made = roster()
    for part in parts:
        for number in part:
            made.offer(record(*number), now=0.0)
    return made.entries


@given(numbers, numbers)
def test_merging_is_commutative(one: list[Number], two: list[Number]) -> None:
    assert merged(one, two) == merged(two, one)


@given(numbers, numbers, numbers)
def test_merging_is_associative(one: list[Number], two: list[Number], three: list[Number]) -> None:
    def known(entries: dict[NodeId, Entry]) -> list[Number]:
        names = {name_to_id(name): name for name in NAMES}
        return [(names[node], *entry.body.number) for node, entry in entries.items()]

    assert merged(known(merged(one, two)), three) == merged(one, known(merged(two, three)))


@given(numbers)
def test_merging_is_idempotent_and_keeps_the_highest_number(received: list[Number]) -> None:
    entries = merged(received)
    assert merged(received, received) == entries
    for name in {name for name, *_ in received}:
        highest = max(number for other, *number in received if other == name)
        assert list(entries[name_to_id(name)].body.number) == highest


@given(numbers)
def test_only_news_is_called_news(received: list[Number]) -> None:
    made = roster()
    for number in received:
        before = made.entries.get(name_to_id(number[0]))
        news = made.offer(record(*number), now=0.0)
        assert news == (before is None or before.body.number < number[1:])


def test_an_author_who_was_not_introduced_is_refused() -> None:
    with pytest.raises(PeerError, match="not introduced"):
        roster().offer(record("stranger"), now=0.0)
    with pytest.raises(PeerError, match="no chain"):
        roster().introduce((b"nobody",))


def test_a_forged_record_changes_nothing() -> None:
    made = roster()
    made.offer(record("a", 1, 1), now=0.0)
    before = dict(made.entries)
    newer = record("a", 2, 1)
    with pytest.raises(PeerError, match="wrong signature"):
        made.offer(Announce(newer.author, newer.body, b"\0" * 32), now=0.0)
    assert made.entries == before


def test_what_others_tell_of_this_node_is_not_kept() -> None:
    made = roster("me")
    assert not made.offer(record("me", 9, 9), now=0.0)
    assert made.entries == {}


def test_who_left_is_listed_and_comes_back_by_a_newer_word_only() -> None:
    made = roster()
    made.offer(record("a", 1, 2, left=True), now=0.0)
    assert made.body(name_to_id("a")) is None
    assert not made.offer(record("a", 1, 1), now=1.0)
    assert made.entries[name_to_id("a")].left
    assert made.offer(record("a", 2, 0), now=2.0)
    assert made.body(name_to_id("a")) is not None


def test_who_was_not_heard_of_for_long_is_dropped() -> None:
    made = roster()
    made.offer(record("a"), now=10.0)
    made.offer(record("b"), now=20.0)
    assert made.expire(15.0 + TTL_S) == [name_to_id("a")]
    assert made.forget(15.0 + TTL_S + FORGET_S) == [name_to_id("a")]
    assert set(made.entries) == {name_to_id("b")}


def test_a_full_roster_takes_no_more_authors_but_known_ones_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMBERS", 4)
    made = roster()
    chain = HashAuthority(name_to_id("a")).chain
    assert made.introduce(chain) == name_to_id("a")
    client = replace(HashAuthority(name_to_id("a")), role="client")
    made.introduce(client.chain)
    assert made.authors[name_to_id("a")].role == "client"
    with pytest.raises(PeerError, match="full"):
        made.introduce(HashAuthority(name_to_id("fifth")).chain)


def test_every_other_content_counts_as_a_change() -> None:
    made = roster()
    made.offer(record("a"), now=0.0)
    made.offer(record("b"), now=TTL_S)
    seen = [made.changes]

    def noted(*, change: bool) -> None:
        assert (made.changes != seen[-1]) is change
        seen.append(made.changes)

    made.offer(record("a"), now=0.0)
    noted(change=False)
    made.offer(record("a", sequence=2, left=True), now=0.0)
    noted(change=True)
    made.bury(name_to_id("b"))
    noted(change=True)
    assert made.expire(TTL_S) == [name_to_id("a")]
    noted(change=True)
    assert made.forget(TTL_S + FORGET_S) == [name_to_id("a")]
    noted(change=True)
    made.remove(name_to_id("b"))
    noted(change=True)
