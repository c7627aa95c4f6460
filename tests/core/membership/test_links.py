from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.membership.links import (
    BARRED_REDIAL_S,
    GRACE_S,
    KEEP_S,
    PING_S,
    REDIAL_MAX_S,
    REDIAL_MIN_S,
    SILENCE_S,
    Links,
)
from tests.core.node.mesh import name_to_id

A, B = name_to_id("a"), name_to_id("b")


def dialed(links: Links, now: float) -> list[str]:
    return [link.node for link in links.dials(now)]


def test_a_new_peer_is_dialed_once_and_not_again_while_the_dial_runs() -> None:
    links = Links()
    links.know(A, 5.0)
    assert links.deadline() == 5.0
    assert dialed(links, 5.0) == [A]
    assert dialed(links, 500.0) == []
    assert links.deadline() is None


def test_failed_dials_are_repeated_with_growing_gaps_up_to_a_bound() -> None:
    links, now, gaps = Links(), 0.0, []
    links.know(A, now)
    for _ in range(40):
        assert dialed(links, now) == [A]
        links.closed(A, "refused", now)
        due = links.links[A].dial_at
        gaps.append(due - now)
        assert dialed(links, due - 0.001) == []
        now = due
    assert gaps[:3] == [REDIAL_MIN_S, 2 * REDIAL_MIN_S, 4 * REDIAL_MIN_S]
    assert gaps == sorted(gaps)
    assert gaps[-1] == REDIAL_MAX_S
    links.opened(A, now)
    links.closed(A, "reset", now)
    assert links.links[A].dial_at == now + REDIAL_MIN_S, "a link that came up starts over"


def test_a_peer_that_bars_this_node_is_left_alone_for_long() -> None:
    links = Links()
    links.know(A, 0.0)
    assert dialed(links, 0.0) == [A]
    links.closed(A, "revoked", 1.0, barred=True)
    assert dialed(links, BARRED_REDIAL_S) == []
    assert dialed(links, 1.0 + BARRED_REDIAL_S) == [A]
    links.opened(A, 2000.0)
    links.closed(A, "reset", 2000.0)
    assert links.links[A].dial_at == 2000.0 + REDIAL_MIN_S, "let in again, it is a peer like any other"


def test_silence_ends_a_link_and_any_word_keeps_it() -> None:
    links = Links()
    links.opened(A, 0.0)
    links.opened(B, 0.0)
    links.heard(A, 1.0)
    links.heard(name_to_id("stranger"), 1.0)
    assert links.silent(SILENCE_S - 0.001) == []
    assert links.silent(SILENCE_S) == [B]
    assert links.silent(SILENCE_S) == [], "each is named once"
    links.closed(B, "no word", SILENCE_S + 0.001)
    assert links.silent(SILENCE_S + 0.5) == []


def test_a_link_whose_end_is_never_told_is_dialed_again() -> None:
    links = Links()
    links.know(A, 0.0)
    links.opened(A, 0.0)
    assert links.silent(SILENCE_S) == [A]
    assert links.unended(SILENCE_S) == []
    links.links[A].ping_at = 99.0
    assert links.deadline() == 2 * SILENCE_S
    assert links.unended(2 * SILENCE_S) == [A]


def test_a_lost_peer_has_a_grace_and_is_given_up_once() -> None:
    links = Links()
    links.want(A, 0.0)
    links.opened(A, 0.0)
    links.closed(A, "reset", 10.0)
    assert links.given_up(10.0 + GRACE_S - 0.001) == []
    assert links.given_up(10.0 + GRACE_S) == [A]
    assert links.given_up(100.0) == []


def test_a_peer_that_comes_back_in_time_is_not_given_up() -> None:
    links = Links()
    links.opened(A, 0.0)
    links.closed(A, "reset", 10.0)
    links.closed(A, "refused", 11.0)
    assert links.links[A].lost_at == 10.0, "a failed dial does not prolong the grace"
    links.opened(A, 12.0)
    assert links.given_up(20.0) == []


def test_a_peer_that_was_never_linked_is_not_given_up() -> None:
    links = Links()
    links.know(A, 0.0)
    links.closed(A, "refused", 1.0)
    assert links.given_up(100.0) == []


def test_a_watched_peer_is_pinged_every_second_and_only_the_newest_answer_counts() -> None:
    links = Links()
    links.opened(A, 0.0)
    links.watch(A, 0.0)
    (first,) = [link.ping_nonce for link in links.pings(0.0)]
    assert list(links.pings(PING_S - 0.001)) == []
    (second,) = [link.ping_nonce for link in links.pings(PING_S)]
    assert second != first
    links.pong(A, first, PING_S + 0.1)
    assert links.links[A].rtt_s is None
    links.pong(A, second, PING_S + 0.25)
    assert links.links[A].rtt_s == 0.25
    links.pong(A, second, PING_S + 0.5)
    assert links.links[A].rtt_s == 0.25, "an answer counts once"
    links.pong(B, second, PING_S)
    assert B not in links.links


def test_pings_that_are_due_soon_go_with_the_one_that_is_due_and_stay_with_it() -> None:
    links = Links()
    for node, at in ((A, 0.0), (B, 0.2)):
        links.opened(node, at)
        links.watch(node, at)
        assert [link.node for link in links.pings(at)] == [node]
    assert [link.node for link in links.pings(PING_S)] == [A, B]
    assert links.deadline() == 2 * PING_S


def test_other_links_are_pinged_often_enough_to_outlast_the_silence() -> None:
    links = Links()
    links.opened(A, 0.0)
    assert [link.node for link in links.pings(0.0)] == [A]
    assert links.deadline() == KEEP_S <= SILENCE_S / 2
    links.watch(A, 0.5)
    assert links.deadline() == 0.5 + PING_S
    links.unwatch(A)
    assert [link.node for link in links.pings(1.5)] == [A]
    assert links.deadline() == 1.5 + KEEP_S


def test_a_link_that_only_the_peer_wants_is_kept_and_not_dialed() -> None:
    links = Links()
    links.opened(A, 0.0)
    assert not links.unwant(A), "the peer opened it, the peer may close it"
    assert links.up(A)
    links.closed(A, "not needed any more", 1.0)
    assert dialed(links, 100.0) == []
    assert links.given_up(100.0) == []
    assert A not in links.links
    links.want(B, 100.0)
    assert dialed(links, 100.0) == [B]
    links.opened(B, 100.0)
    assert links.unwant(B), "who opened it closes it"


def test_a_forgotten_peer_is_not_dialed() -> None:
    links = Links()
    links.know(A, 0.0)
    links.forget(A)
    links.forget(A)
    assert dialed(links, 100.0) == []
    assert not links.up(A)


steps = st.lists(
    st.tuples(st.sampled_from(["open", "close", "dial", "hear", "wait"]), st.floats(0.0, 4.0)), max_size=60
)


@given(steps)
def test_a_peer_is_always_linked_being_dialed_or_due_within_the_bound(history: list[tuple[str, float]]) -> None:
    links, now, dialing = Links(), 0.0, False
    links.know(A, now)
    for what, wait in history:
        now += wait
        match what:
            case "open":
                links.opened(A, now)
                dialing = False
            case "close":
                links.closed(A, "lost", now)
                dialing = False
            case "dial":
                begun = bool(dialed(links, now))
                assert not (begun and dialing), "two dials of one peer"
                dialing = dialing or begun
            case "hear":
                links.heard(A, now)
        link = links.links[A]
        assert link.up or link.dialing or link.dial_at <= now + REDIAL_MAX_S
        due = links.deadline()
        assert link.dialing or (due is not None and due <= now + max(REDIAL_MAX_S, PING_S, GRACE_S))
