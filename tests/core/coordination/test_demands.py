"""Demands merge in any order to the same set, stay bounded, and are believed only from members."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import permutations
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.coordination import demands as module
from meshnode.core.coordination.demands import (
    BODY_BYTES,
    REMEMBER_S,
    REMOVED,
    WANTED,
    Demands,
    encode_demand,
    read,
)
from meshnode.errors import ConfigError, PeerError
from meshnode.identity.domains import Domain
from meshnode.identity.ids import NodeId, node_id_of
from meshnode.wire.demand import Demand, DeploymentId
from meshnode.wire.messages import DemandRecord

A, B = node_id_of(b"a"), node_id_of(b"b")


@dataclass(frozen=True)
class Member:
    node: NodeId
    role: str = "member"
    honest: bool = True

    def signed(self, domain: Domain, data: bytes, signature: bytes) -> bool:
        return self.honest and domain is Domain.DEMAND and signature == b"signature"


def demand(deployment: str = "d1", version: int = 1, author: NodeId = A, **more: object) -> Demand:
    return Demand(DeploymentId(deployment), version, author, "0" * 64, "model", **more)


def record(wanted: Demand) -> DemandRecord:
    return DemandRecord(wanted.author, (b"leaf",), msgspec.msgpack.encode(wanted), b"signature")


def merged(wanted: list[Demand]) -> Demands:
    demands = Demands()
    for each in wanted:
        demands.offer(record(each), each)
    return demands


some = st.builds(
    demand,
    deployment=st.sampled_from(("d1", "d2", "d3")),
    version=st.integers(1, 3),
    author=st.sampled_from((A, B)),
    removed=st.booleans(),
    context=st.sampled_from((0, 512)),
    created=st.integers(0, 3),
)


@given(st.lists(some, max_size=5))
def test_any_order_and_any_repetition_gives_the_same_set(wanted: list[Demand]) -> None:
    expected = merged(wanted).encode()
    for order in permutations(wanted):
        assert merged([*order, *order[:2]]).encode() == expected


@given(st.lists(some, max_size=8), st.lists(some, max_size=8))
def test_merging_sets_is_merging_what_is_in_them(one: list[Demand], two: list[Demand]) -> None:
    inside = [known.demand for known in merged(one).ordered]
    assert merged([*inside, *two]).encode() == merged([*one, *two]).encode()


def test_the_later_version_counts_and_then_the_higher_author() -> None:
    demands = merged([demand(version=2), demand(version=1, author=max(A, B))])
    assert demands.find("d1") == demand(version=2)
    higher = demand(version=2, author=max(A, B), context=512)
    assert demands.offer(record(higher), higher).news
    assert demands.find("d1") == higher


def test_what_was_removed_comes_back_only_by_a_later_version() -> None:
    demands = merged([demand(version=2, removed=True), demand()])
    assert demands.wanted() == []
    later = demand(version=3)
    demands.offer(record(later), later)
    assert demands.wanted() == [later]


def test_too_many_are_cut_the_same_way_in_any_order() -> None:
    wanted = [demand(f"{number:04}", created=number) for number in range(WANTED + 5)]
    removed = [demand(f"x{number:04}", removed=True, created=number) for number in range(REMOVED + 5)]
    first, second = merged([*wanted, *removed]), merged([*reversed(removed), *reversed(wanted)])
    assert first.encode() == second.encode()
    assert [each.created for each in first.wanted()] == list(range(WANTED)), "the oldest stay"
    assert len(first.known) == WANTED + REMOVED
    assert first.find("x0000") is None, "the latest stay"


def crowd(one: int, two: int, created: int = 0) -> list[Demand]:
    """So many of A, which says that they are the oldest of all, and of B."""
    greedy = [demand(f"a{number:04}", created=created) for number in range(one)]
    return greedy + [demand(f"b{number:04}", author=B, created=5 + number) for number in range(two)]


@pytest.mark.parametrize(
    ("one", "two", "kept"),
    [
        (WANTED, 0, (WANTED, 0)),
        (10 * WANTED, 1, (WANTED - 1, 1)),
        (WANTED, WANTED // 2, (WANTED // 2, WANTED // 2)),
        (WANTED, WANTED, (WANTED // 2, WANTED // 2)),
        (3, WANTED, (3, WANTED - 3)),
    ],
)
def test_one_member_cannot_take_the_room_of_others(one: int, two: int, kept: tuple[int, int]) -> None:
    wanted = crowd(one, two)
    for order in (wanted, wanted[::-1]):
        demands = merged(order)
        assert Counter(each.author for each in demands.wanted()) == Counter({A: kept[0], B: kept[1]})
        assert demands.encode() == merged(wanted).encode()
    oldest = {demand.created for demand in demands.wanted() if demand.author == B}
    assert oldest == {5 + number for number in range(kept[1])}


@pytest.mark.parametrize(
    ("one", "two", "room"),
    [
        (WANTED - 1, 0, (True, True)),
        (WANTED, 0, (False, True)),
        (WANTED, 1, (False, True)),
        (WANTED // 2, WANTED // 2, (False, False)),
        (WANTED - 3, 3, (False, True)),
    ],
)
def test_who_asks_for_one_more_is_told_whether_it_would_stay(one: int, two: int, room: tuple[bool, bool]) -> None:
    for author, expected in zip((A, B), room, strict=True):
        demands = merged(crowd(one, two))
        late = demand("late", author=author, created=10**6)
        assert (demands.has_room(author), demands.offer(record(late), late).news) == (expected, expected)


several = st.dictionaries(
    st.sampled_from([f"d{number}" for number in range(12)]),
    st.tuples(st.sampled_from((A, B, node_id_of(b"c"))), st.integers(0, 3)),
    max_size=12,
)


@given(several, st.randoms(use_true_random=False), st.integers(0, 12))
def test_more_than_there_is_room_for_is_cut_the_same_way_in_any_order_and_in_any_parts(
    told: dict[str, tuple[NodeId, int]], random: Random, part: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WANTED", 4)
        wanted = [demand(key, author=author, created=created) for key, (author, created) in told.items()]
        expected = merged(wanted).encode()
        random.shuffle(wanted)
        assert merged([*wanted, *wanted[:part]]).encode() == expected
        one, two = ([each.demand for each in merged(half).ordered] for half in (wanted[:part], wanted[part:]))
        assert merged([*two, *one]).encode() == expected, "what is cut from a part is cut from the whole"


@given(st.lists(some, max_size=8), st.lists(some, max_size=8))
def test_two_that_tell_each_other_all_they_have_agree_also_where_there_is_no_room(
    one: list[Demand], two: list[Demand]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WANTED", 2)
        mine, theirs = merged(one), merged(two)
        for _ in range(3):  # a removal that makes room may come behind what it makes room for
            for here, there in ((mine, theirs), (theirs, mine)):
                for known in there.ordered:
                    here.offer(known.record, known.demand)
        assert mine.encode() == theirs.encode()


def test_what_is_not_held_is_no_news() -> None:
    demands = merged([demand(f"{number:04}", created=number) for number in range(WANTED)])
    late = demand("late", created=WANTED)
    assert demands.offer(record(late), late) == (False, [], [record(late)])
    assert not demands.has_room(A)


def test_a_restart_knows_everything_again_but_what_was_removed_a_month_ago() -> None:
    demands = merged([demand(), demand("d2", removed=True, created=5), demand("d3", removed=True, created=100)])
    again = Demands()
    again.restore(demands.encode(), REMEMBER_S + 50)
    assert sorted(again.known) == ["d1", "d3"]


def test_a_damaged_file_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="demands") as error:
        Demands().restore(b"\xc1", 0)
    assert "Delete" in error.value.hint


def test_a_member_is_believed() -> None:
    assert read(record(demand()), Member(A)) == demand()


@pytest.mark.parametrize(
    ("told", "author", "words"),
    [
        (record(demand()), Member(A, honest=False), "wrong signature"),
        (record(demand()), Member(A, role="client"), "only members"),
        (record(demand()), Member(B), "another node's name"),
        (msgspec.structs.replace(record(demand()), author=B), Member(B), "another node's name"),
        (msgspec.structs.replace(record(demand()), body=b"\xc1"), Member(A), "malformed"),
        (msgspec.structs.replace(record(demand()), body=bytes(BODY_BYTES + 1)), Member(A), "oversized"),
        (msgspec.structs.replace(record(demand()), chain=(bytes(5000),)), Member(A), "oversized"),
        (record(demand(version=0)), Member(A), "impossible"),
        (record(demand(context=-1)), Member(A), "impossible"),
        (record(demand("d" * 17)), Member(A), "impossible"),
        (record(demand(pins=("nobody",))), Member(A), "impossible"),
        (record(demand(pins=(A,) * 65)), Member(A), "impossible"),
        (record(demand(removed=True, pins=(A,) * 40)), Member(A), "impossible"),
        (record(demand(kv_type="\x1b[2J")), Member(A), "impossible"),
    ],
)
def test_what_no_member_could_have_signed_is_refused(told: DemandRecord, author: Member, words: str) -> None:
    with pytest.raises(PeerError, match=words):
        read(told, author)


def test_a_signature_is_looked_at_but_where_the_simulator_wants_it_not_to_be() -> None:
    liar = replace(Member(A), honest=False)
    assert read(record(demand()), liar, verify=False) == demand()


def test_options_that_no_message_holds_are_the_users_error() -> None:
    with pytest.raises(ConfigError, match="no message holds"):
        encode_demand(demand(excludes=(A,) * 65))
