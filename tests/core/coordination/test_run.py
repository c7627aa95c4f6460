from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.coordination.ledger import TERM_JUMP
from meshnode.core.coordination.orders import (
    CloseHead,
    Decide,
    Drained,
    DrainHead,
    Ended,
    FetchedAll,
    Hops,
    OpenHead,
    Order,
    RunOrder,
    Served,
    ServeHead,
)
from meshnode.core.coordination.run import (
    ACT_S,
    CLAIM_S,
    COMMIT_S,
    CONNECT_S,
    RENEW_S,
    TEXT_CHARACTERS,
    TRANSITIONS,
    UNDER_WAY,
    Run,
    State,
)
from meshnode.identity.ids import NodeId
from meshnode.wire.messages import (
    Abort,
    AnyMessage,
    Claim,
    Commit,
    Committed,
    Connect,
    Connected,
    Failed,
    FenceOff,
    Fetched,
    Grant,
    Leave,
    Ping,
    Prepare,
    Progress,
    Ready,
    Refuse,
    Renew,
    Renewed,
    Unknown,
)
from tests.core.coordination.claims import A, B, C, claim, fence

LOAD_S = 600.0
DRAIN_S = 60.0
HOPS = Hops((b"0" * 16, b"1" * 16, b"2" * 16, b"3" * 16), ("s0", "s1", "s2", "head"))
"""Three stages: A has the first and the last, B the one between."""


def run_in(state: State) -> Run:
    """A run that came to `state` by the ordinary way."""
    run = Run(claim((A, B, A)), source=A, hops=HOPS, startup_timeout_s=LOAD_S, drain_first=state is State.FETCHING)
    run.start(0.0)
    if state is State.CLAIMING:
        return run
    for node in (A, B):
        run.received(node, Grant(fence(), "d1"), 0.0)
    if state in (State.PREPARING, State.FETCHING):
        return run
    for stage, node in enumerate((A, B, A)):
        run.received(node, Ready(fence(), stage), 0.0)
    if state is State.CONNECTING:
        return run
    run.head_opened(0.0)
    if state is State.COMMITTING:
        return run
    for node in (A, B):
        run.received(node, Committed(fence()), 0.0)
    match state:
        case State.DRAINING:
            run.drain(0.0, DRAIN_S)
        case State.BROKEN:
            run.lost(B, "gone")
            run.keep(0.0, DRAIN_S)
        case State.ENDED:
            run.end("withdrawn", "no longer wanted")
    return run


def renewed(run: Run, now: float) -> None:
    """Every participant answers the renewal that is sent at `now`."""
    for node, renew in messages(run.renewals(now), Renew):
        assert isinstance(renew, Renew)
        run.received(node, Renewed(renew.fence, renew.number), now)


def messages(orders: list[RunOrder], kind: type) -> list[tuple[NodeId, AnyMessage]]:
    return [(o.node, o.message) for o in orders if isinstance(o, Order) and isinstance(o.message, kind)]


def test_every_participant_is_asked_once() -> None:
    run = Run(claim((A, B, A)), A, HOPS, LOAD_S)
    assert run.start(5.0) == [Order(A, run.claim), Order(B, run.claim)]
    assert run.deadline == 5.0 + CLAIM_S


def test_preparing_begins_when_all_have_granted_and_a_majority_is_not_enough() -> None:
    run = run_in(State.CLAIMING)
    for _ in range(3):
        assert run.received(A, Grant(fence(), "d1"), 1.0) == []
    assert run.state is State.CLAIMING
    orders = run.received(B, Grant(fence(), "d1"), 2.0)
    assert [(node, order.stage) for node, order in messages(orders, Prepare)] == [(A, 0), (B, 1), (A, 2)]
    assert run.state is State.PREPARING
    assert run.deadline == 2.0 + LOAD_S


def test_the_hops_of_neighbouring_stages_meet_and_the_ends_meet_the_head() -> None:
    run = run_in(State.CLAIMING)
    run.received(A, Grant(fence(), "d1"), 0.0)
    orders = [order for _, order in messages(run.received(B, Grant(fence(), "d1"), 0.0), Prepare)]
    upstream = [(order.upstream.token, order.upstream.peer_name, order.upstream.node) for order in orders]
    downstream = [(order.downstream.token, order.downstream.peer_name, order.downstream.node) for order in orders]
    assert upstream == [(b"0" * 16, "head", A), (b"1" * 16, "s0", A), (b"2" * 16, "s1", B)]
    assert downstream == [(b"1" * 16, "s1", B), (b"2" * 16, "s2", A), (b"3" * 16, "head", A)]


def test_connecting_begins_when_every_stage_is_ready() -> None:
    run = run_in(State.PREPARING)
    assert run.received(A, Ready(fence(), 0), 1.0) == []
    assert run.received(B, Ready(fence(), 1), 1.0) == []
    assert run.received(A, Ready(fence(), 2), 3.0) == [
        Order(A, Connect(fence())),
        Order(B, Connect(fence())),
        OpenHead(fence()),
    ]
    assert run.state is State.CONNECTING
    assert run.deadline == 3.0 + CONNECT_S


def test_it_commits_when_the_head_came_through_with_the_decision_on_disk_first() -> None:
    run = run_in(State.CONNECTING)
    run.received(B, Connected(fence(), 1), 1.0)
    assert run.head_opened(2.0) == [Decide(fence()), Order(A, Commit(fence())), Order(B, Commit(fence()))]
    assert run.deadline == 2.0 + COMMIT_S


def test_it_serves_when_every_participant_has_committed_and_not_before() -> None:
    run = run_in(State.COMMITTING)
    assert run.received(B, Committed(fence()), 1.0) == []
    assert run.received(B, Committed(fence()), 1.0) == []
    assert run.state is State.COMMITTING
    assert run.received(A, Committed(fence()), 2.0) == [ServeHead(fence()), Served(fence())]
    assert (run.state, run.deadline) == (State.SERVING, None)


def test_a_run_in_anothers_place_only_fetches_until_that_one_is_gone() -> None:
    run = run_in(State.FETCHING)
    assert run.received(A, Fetched(fence(), 0), 1.0) == []
    assert run.received(B, Fetched(fence(), 1), 1.0) == []
    assert not run.waits_for_room
    assert run.received(A, Fetched(fence(), 2), 1.0) == [FetchedAll(fence())]
    assert run.waits_for_room
    orders = [order for _, order in messages(run.room_made(5.0), Prepare)]
    assert [(order.stage, order.hold) for order in orders] == [(0, False), (1, False), (2, False)]
    assert run.room_made(6.0) == []


def test_a_run_that_drains_can_serve_again_until_it_is_fenced() -> None:
    run = run_in(State.SERVING)
    assert run.drain(1.0, DRAIN_S) == [DrainHead(fence())]
    assert run.drain(1.0, DRAIN_S) == []
    assert run.resume() == [ServeHead(fence())]
    run.drain(2.0, DRAIN_S)
    orders = run.fence_off(claim((A, C), term=2, run=2))
    fenced = FenceOff(fence(2, 2), "d1")
    assert messages(orders, FenceOff) == [(A, fenced), (B, fenced), (C, fenced)]
    assert orders[3:] == [CloseHead(fence()), Ended(fence(), "drained", "", served=True)]
    assert run.resume() == []


def test_the_streams_of_a_run_that_drains_have_a_bounded_time() -> None:
    run = run_in(State.DRAINING)
    for now in range(0, int(DRAIN_S), 5):
        renewed(run, float(now))
        assert run.expire(float(now)) == []
    assert run.expire(DRAIN_S) == [Drained(fence())]
    assert run.expire(DRAIN_S) == []


def test_what_gives_way_tells_only_those_who_do_not_load_its_successor() -> None:
    run = run_in(State.DRAINING)
    orders = run.give_way(claim((B, C), term=2, run=2))
    assert messages(orders, Abort) == [(A, Abort(fence(), "replaced"))]
    assert run.state is State.ENDED


@pytest.mark.parametrize("how", ["failed", "lost", "head", "lease"])
def test_a_run_that_serves_breaks_and_keeps_its_slices_for_a_while(how: str) -> None:
    run = run_in(State.SERVING)
    match how:
        case "failed":
            orders = run.received(B, Failed(fence(), 1, "stage_lost", "killed"), 1.0)
        case "lost":
            orders = run.lost(B, "gone")
        case "head":
            orders = run.head_failed("silence")
        case _:
            orders = run.expire(ACT_S)
    assert orders[0] == CloseHead(fence())
    assert isinstance(orders[1], Ended)
    assert orders[1].served
    assert len(orders) == 2, "nobody is told to free anything"
    run.keep(1.0, 10.0)
    assert (run.lost(A, ""), run.expire(10.9)) == ([], [])
    told = Abort(fence(), "not_taken_over")
    assert messages(run.expire(11.0), Abort) == [(A, told), (B, told)]


def test_leases_are_renewed_and_lost_with_the_oldest_of_the_participants() -> None:
    run = run_in(State.SERVING)
    assert run.renewals(RENEW_S - 0.1) == []
    first = messages(run.renewals(RENEW_S), Renew)
    assert first == [(A, Renew(fence(), 1)), (B, Renew(fence(), 1))]
    run.received(A, Renewed(fence(), 1), 6.0)
    assert run.due_at() == 2 * RENEW_S
    assert run.expire(ACT_S - 0.1) == [], "the claim itself was the first renewal"
    lost = run.expire(ACT_S)[-1]
    assert isinstance(lost, Ended)
    assert (lost.reason, lost.node) == ("lease_lost", B)


def test_a_renewal_counts_from_its_sending_and_never_backwards() -> None:
    run = run_in(State.SERVING)
    run.renewals(5.0)
    run.renewals(10.0)
    for number in (2, 1, 7, -1):
        for node in (A, B):
            run.received(node, Renewed(fence(), number), 11.0)
    assert run.expire(10.0 + ACT_S - 0.1) == []
    assert run.expire(10.0 + ACT_S) != []


def test_a_participant_that_does_not_hold_the_run_any_more_is_lost() -> None:
    run = run_in(State.PREPARING)
    end = run.received(B, Renewed(fence(), 1, held=False), 1.0)[-1]
    assert isinstance(end, Ended)
    assert (end.reason, end.node) == ("participant_lost", B)


@pytest.mark.parametrize("state", [state for state in State if state in UNDER_WAY or state is State.DRAINING])
@pytest.mark.parametrize("how", ["refused", "failed", "lost", "ended", "expired"])
def test_whatever_ends_a_run_everybody_who_was_asked_is_told(state: State, how: str) -> None:
    run = run_in(state)
    served = state is State.DRAINING
    match how:
        case "refused":
            orders = run.received(B, Refuse(fence(), "d1", "no_room", "too small", promised=3), 1.0)
            end = Ended(fence(), "no_room", "too small", B, 3, served, room=0)
        case "failed":
            orders = run.received(B, Failed(fence(), 1, "model", "corrupt"), 1.0)
            end = Ended(fence(), "model", "corrupt", B, 0, served)
        case "lost":
            assert run.lost(C, "not of this run") == []
            orders = run.lost(B, "the link was lost")
            end = Ended(fence(), "participant_lost", "the link was lost", B, 0, served)
        case "ended":
            orders = run.end("withdrawn", "no longer wanted")
            end = Ended(fence(), "withdrawn", "no longer wanted", None, 0, served)
        case _:
            orders = run.expire(1e9)
            told = orders[-1]
            assert isinstance(told, Ended)
            end = Ended(fence(), told.reason, told.message, told.node, 0, served)
    opened = [CloseHead(fence())] if state in (State.CONNECTING, State.COMMITTING, State.DRAINING) else []
    told_all = [Order(A, Abort(fence(), end.reason)), Order(B, Abort(fence(), end.reason))]
    assert orders == [*opened, *told_all, end]
    assert run.state is State.ENDED
    assert (run.end("again", ""), run.lost(A, ""), run.expire(1e9), run.head_opened(1e9)) == ([], [], [], [])


def test_who_did_not_answer_is_the_one_to_blame() -> None:
    run = run_in(State.CLAIMING)
    run.received(A, Grant(fence(), "d1"), 0.0)
    assert run.expire(CLAIM_S - 0.001) == []
    assert run.expire(CLAIM_S)[-1] == Ended(fence(), "timed_out", "no progress while claiming", B)
    run = run_in(State.PREPARING)
    run.received(A, Ready(fence(), 0), 0.0)
    for now in range(5, int(LOAD_S), 5):
        renewed(run, float(now))
    assert run.expire(LOAD_S)[-1] == Ended(fence(), "timed_out", "no progress while preparing", B)
    run = run_in(State.CONNECTING)
    for stage, node in enumerate((A, B, A)):
        run.received(node, Connected(fence(), stage), 0.0)
    for now in range(5, int(CONNECT_S), 5):
        renewed(run, float(now))
    assert run.expire(CONNECT_S)[-1] == Ended(fence(), "timed_out", "no progress while connecting", None)


def test_loading_is_bounded_since_its_last_progress() -> None:
    run = run_in(State.PREPARING)
    report = Progress(fence(), 1, "fetching", 1, 10)
    run.received(B, report, 100.0)
    assert run.deadline == 100.0 + LOAD_S
    run.received(B, report, 300.0)
    assert run.deadline == 100.0 + LOAD_S, "the same figure again is no progress"
    run.received(B, Progress(fence(), 1, "fetching", 2, 10), 300.0)
    assert run.deadline == 300.0 + LOAD_S


def test_progress_outside_the_loading_moves_no_deadline() -> None:
    for state in (State.CLAIMING, State.CONNECTING, State.SERVING):
        run = run_in(state)
        before = run.deadline
        run.received(B, Progress(fence(), 1, "loading", 1, 10), 5.0)
        assert run.deadline == before


@pytest.mark.parametrize("stage", [-100, -2, -1, 0, 2, 3, 2**63])
def test_a_report_about_a_stage_that_is_not_the_senders_changes_nothing(stage: int) -> None:
    for state in State:
        run = run_in(state)
        before = dict(run.stages)
        for report in (
            Progress(fence(), stage, "x", 0, 0),
            Ready(fence(), stage),
            Connected(fence(), stage),
            Failed(fence(), stage, "x", "x"),
        ):
            assert run.received(B, report, 1.0) == []
        assert (run.state, run.stages, run.progress) == (state, before, {})


FROM_B: dict[type, AnyMessage] = {
    Grant: Grant(fence(), "d1"),
    Refuse: Refuse(fence(), "d1", "no_room", ""),
    Progress: Progress(fence(), 1, "loading", 1, 2),
    Ready: Ready(fence(), 1),
    Connected: Connected(fence(), 1),
    Failed: Failed(fence(), 1, "model", ""),
    Fetched: Fetched(fence(), 1),
    Renewed: Renewed(fence(), 0),
    Committed: Committed(fence()),
    Claim: claim(),
    Abort: Abort(fence(), "x"),
    Commit: Commit(fence()),
    Connect: Connect(fence()),
    Ping: Ping(1),
    Leave: Leave(),
    Unknown: Unknown("x"),
}
STAYS = (State.ENDED, State.BROKEN)
ENDING = {(state, kind) for state in State for kind in (Refuse, Failed) if state not in STAYS}


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("kind", list(FROM_B), ids=lambda kind: kind.__name__)
def test_a_message_moves_a_run_only_where_the_table_says(state: State, kind: type) -> None:
    run = run_in(state)
    orders = run.received(B, FROM_B[kind], 1.0)
    if (state, kind) in ENDING:
        assert run.state is (State.BROKEN if state is State.SERVING else State.ENDED)
    else:
        assert (run.state, orders) == (state, [])


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("kind", list(FROM_B), ids=lambda kind: kind.__name__)
def test_strangers_change_nothing_in_any_state(state: State, kind: type) -> None:
    run = run_in(state)
    before = (run.state, run.deadline, dict(run.stages), set(run.granted), dict(run.progress))
    assert run.received(C, FROM_B[kind], 1.0) == []
    assert (run.state, run.deadline, run.stages, run.granted, run.progress) == before


def test_a_liar_cannot_drive_the_terms_where_no_participant_follows() -> None:
    run = run_in(State.CLAIMING)
    end = run.received(B, Refuse(fence(), "d1", "old_term", "", promised=2**64 - 1), 0.0)[-1]
    assert isinstance(end, Ended)
    assert end.promised + 1 - fence().term <= TERM_JUMP


def test_a_participants_words_are_kept_printable_and_short() -> None:
    run = run_in(State.PREPARING)
    end = run.received(B, Failed(fence(), 1, "model", "\x1b[2Jbad\n" + "x" * 5000), 0.0)[-1]
    assert isinstance(end, Ended)
    assert end.message.startswith(" [2Jbad x")
    assert len(end.message) == TEXT_CHARACTERS


reports = st.sampled_from([A, B, C]).flatmap(
    lambda node: st.tuples(
        st.just(node),
        st.sampled_from(list(FROM_B.values()))
        | st.integers(-1, 3).map(lambda stage: Ready(fence(), stage))
        | st.integers(-1, 3).map(lambda stage: Connected(fence(), stage)),
    )
)
events = st.lists(reports | st.sampled_from(["opened", "lost", "expire"]), max_size=40)


@given(events)
def test_any_history_follows_the_table_and_ends_once(history: list[tuple[NodeId, AnyMessage] | str]) -> None:
    run = Run(claim((A, B, A)), A, HOPS, LOAD_S)
    run.start(0.0)
    now, ended, aborted = 0.0, 0, 0
    for event in history:
        before, now = run.state, now + 3.0
        renewed(run, now)
        match event:
            case "opened":
                orders = run.head_opened(now)
            case "lost":
                orders = run.lost(B, "gone")
            case "expire":
                orders = run.expire(now)
            case (node, message):
                orders = run.received(node, message, now)
        assert run.state is before or run.state in TRANSITIONS[before]
        assert before is not State.ENDED or not orders
        assert run.due_at() is not None or run.state is State.ENDED
        ended += sum(isinstance(order, Ended) for order in orders)
        aborted += len(messages(orders, Abort))
    assert ended == (run.state in (State.ENDED, State.BROKEN))
    assert aborted == 2 * (run.state is State.ENDED)
