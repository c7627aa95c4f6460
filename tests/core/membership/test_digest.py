from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.membership.digest import Digest, bucket_of, id_of
from meshnode.wire.limits import GOSSIP_BUCKETS, GOSSIP_ID
from meshnode.wire.messages import Announce, Suspect
from tests.core.node.mesh import name_to_id

A = name_to_id("a")
numbers = st.lists(st.integers(0, 40), max_size=30)


def item(number: int) -> Announce:
    return Announce(A, b"%d" % number, b"signature")


def digest(held: list[int], gone: list[int] | None = None) -> Digest:
    made = Digest()
    for number in [*held, *(gone or [])]:
        made.add(item(number))
    for number in gone or []:
        if number not in held:
            made.remove(id_of(item(number)))
    return made


@given(numbers, numbers)
def test_roots_are_equal_exactly_when_the_items_are(one: list[int], two: list[int]) -> None:
    assert (digest(one).root() == digest(two).root()) == (set(one) == set(two))


@given(numbers, numbers)
def test_what_was_removed_leaves_no_trace(held: list[int], gone: list[int]) -> None:
    assert digest(held, gone).root() == digest(held).root()
    assert digest(held, gone).items == digest(held).items


@given(numbers, numbers)
def test_a_root_that_was_asked_for_before_follows_what_comes_and_goes(held: list[int], gone: list[int]) -> None:
    made = Digest()
    for number in [*held, *gone]:
        made.add(item(number))
        made.root()
    for number in gone:
        made.remove(id_of(item(number)))
        made.root()
    assert made.root() == digest([number for number in held if number not in gone]).root()


@given(numbers, numbers)
def test_buckets_that_differ_hold_the_difference(one: list[int], two: list[int]) -> None:
    mine, theirs = digest(one), digest(two)
    differ = {bucket for bucket in range(GOSSIP_BUCKETS) if mine.hashes()[bucket] != theirs.hashes()[bucket]}
    assert differ == {bucket_of(identity) for identity in set(mine.items) ^ set(theirs.items)}
    assert set(mine.within(differ)) - set(theirs.within(differ)) == set(mine.items) - set(theirs.items)


def test_an_id_is_of_what_was_signed_alone() -> None:
    assert len(id_of(item(1))) == GOSSIP_ID
    assert id_of(item(1)) == id_of(Announce(A, b"1", b"signature", 5)) == id_of(Suspect(A, b"1", b""))
