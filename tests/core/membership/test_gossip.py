from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import count

import pytest

from meshnode.core.membership import gossip as module
from meshnode.core.membership.gossip import FANOUT, RETRY_S, Gossip, pick
from meshnode.identity.ids import NodeId
from tests.core.node.mesh import name_to_id

PEERS = [name_to_id(f"p{index}") for index in range(12)]
X, Y = b"x" * 16, b"y" * 16


def drawing() -> Callable[[int], bytes]:
    numbers = count()
    return lambda size: hashlib.sha256(b"%d" % next(numbers)).digest()[:size]


def gossip(held: set[bytes] | None = None) -> Gossip:
    return Gossip(drawing(), held or set())


def told(made: Gossip, size: int, linked: list[NodeId], until: float) -> dict[NodeId, list[bytes]]:
    """Whom `made` tells what, round by round."""
    heard: dict[NodeId, list[bytes]] = {}
    while (at := made.deadline()) is not None and at <= until:
        tell = made.round(linked, size, at)
        assert len(tell) <= (len(linked) if size <= 16 else FANOUT)
        for peer, ids in tell:
            heard.setdefault(peer, []).extend(ids)
    return heard


def test_in_a_small_mesh_everybody_who_may_not_have_it_is_told_at_once() -> None:
    made = gossip()
    made.spread(X, 8, {PEERS[0]}, 5.0)
    assert made.deadline() == 5.0
    assert told(made, 8, PEERS[:7], 5.0) == {peer: [X] for peer in PEERS[1:7]}
    assert made.deadline() is None


def test_in_a_large_mesh_four_are_told_in_each_round_and_nobody_twice() -> None:
    made = gossip()
    made.spread(X, 256, {PEERS[0]}, 0.0)
    made.spread(Y, 256, set(), 0.0)
    assert made.deadline() == 0.0, "the first round is at once, the next ones keep their distance"
    heard = told(made, 256, PEERS, 60.0)
    assert set(heard) <= set(PEERS)
    assert all(len(ids) == len(set(ids)) for ids in heard.values())
    assert X not in heard.get(PEERS[0], [])
    assert len(heard) > 2 * FANOUT


def test_a_rumour_ends_after_its_rounds_and_when_everybody_has_it() -> None:
    made = gossip()
    made.spread(X, 32, set(), 0.0)
    rounds = 0
    while (at := made.deadline()) is not None:
        made.round([], 33, at) if rounds else made.round(PEERS[:1], 33, at)
        rounds += 1
        assert rounds <= 10
    made.spread(X, 32, set(PEERS), 60.0)
    assert made.round(PEERS, 32, 60.0) == []
    assert made.deadline() is None


def test_what_is_new_is_asked_for_once_until_the_answer_had_its_time() -> None:
    made = gossip({Y})
    assert made.named(PEERS[0], (X, Y), 8, 0.0) == (X,)
    assert made.named(PEERS[1], (X,), 8, RETRY_S / 2) == ()
    assert made.named(PEERS[1], (X,), 8, RETRY_S) == (X,)
    made.saw(X)
    assert made.named(PEERS[1], (X,), 8, 99.0) == ()
    assert made.deadline() is None


def test_another_that_named_it_is_asked_when_the_first_does_not_answer() -> None:
    made = gossip()
    made.named(PEERS[0], (X,), 8, 0.0)
    for peer in PEERS[1:]:
        assert made.named(peer, (X,), 8, 0.1) == ()
    assert made.deadline() == RETRY_S
    asked = []
    while (at := made.deadline()) is not None:
        asked += made.retries(at)
    assert asked == [(PEERS[1], X), (PEERS[2], X)]


def test_no_more_is_asked_for_than_can_be_answered() -> None:
    made = gossip()
    ids = tuple(bytes([index]) * 16 for index in range(9))
    assert made.named(PEERS[0], ids, 4, 0.0) == ids[:4]
    assert made.named(PEERS[1], ids, 4, 0.0) == ids[4:8]


def test_whoever_names_a_rumour_is_not_told_of_it() -> None:
    made = gossip()
    made.spread(X, 8, set(), 0.0)
    made.named(PEERS[1], (X,), 8, 0.0)
    assert PEERS[1] not in told(made, 8, PEERS[:3], 0.0)


def test_memories_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEEN", 4)
    monkeypatch.setattr(module, "ASKED", 4)
    monkeypatch.setattr(module, "RUMOURS", 2)
    made = gossip()
    ids = [bytes([index]) * 16 for index in range(10)]
    for identity in ids:
        made.spread(identity, 8, set(), 0.0)
    assert made.round(PEERS[:1], 8, 0.0) == [(PEERS[0], tuple(ids[-2:]))]
    assert made.named(PEERS[0], tuple(ids), 99, 0.0) == tuple(ids[:6])
    assert made.named(PEERS[0], tuple(ids), 99, 0.0) == tuple(ids[:6]), "questions beyond the bound are forgotten"


def test_random_choice_is_the_drawings_alone() -> None:
    assert pick(drawing(), PEERS, 4) == pick(drawing(), PEERS, 4)
    assert len(set(pick(drawing(), PEERS, 4))) == 4
    assert sorted(pick(drawing(), PEERS[:2], 4)) == sorted(PEERS[:2])
