from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.coordination.ledger import TERM_JUMP
from meshnode.core.coordination.run import (
    CLAIM_S,
    CONNECT_S,
    TEXT_CHARACTERS,
    TRANSITIONS,
    CloseHead,
    Ended,
    Hops,
    OpenHead,
    Order,
    Run,
    RunOrder,
    State,
)
from meshnode.identity.ids import NodeId
from meshnode.wire.messages import (
    Abort,
    AnyMessage,
    Claim,
    Commit,
    Connect,
    Connected,
    Failed,
    Grant,
    Leave,
    Ping,
    Prepare,
    Progress,
    Ready,
    Refuse,
    Unknown,
)
from tests.core.coordination.claims import A, B, C, claim, fence

LOAD_S = 600.0
HOPS = Hops((b"0" * 16, b"1" * 16, b"2" * 16, b"3" * 16), ("s0", "s1", "s2", "head"))
"""Three stages: A has the first and the last, B the one between."""


def run_in(state: State) -> Run:
    """A run that came to `state` by the ordinary way."""
    run = Run(claim((A, B, A)), source=A, hops=HOPS, startup_timeout_s=LOAD_S)
    run.start(0.0)
    if state is State.CLAIMING:
        return run
    for node in (A, B):
        run.received(node, Grant(fence(), "d1"), 0.0)
    if state is State.PREPARING:
        return run
    for stage, node in enumerate((A, B, A)):
        run.received(node, Ready(fence(), stage), 0.0)
    if state is State.CONNECTING:
        return run
    run.head_opened(0.0)
    if state is State.ENDED:
        run.end("withdrawn", "no longer wanted")
    return run


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


def test_it_serves_when_the_head_came_through_and_says_so_to_all() -> None:
    run = run_in(State.CONNECTING)
    run.received(B, Connected(fence(), 1), 1.0)
    assert run.head_opened(2.0) == [Order(A, Commit(fence())), Order(B, Commit(fence()))]
    assert run.state is State.SERVING
    assert run.deadline is None
    assert run.expire(1e9) == []


@pytest.mark.parametrize("state", [state for state in State if state is not State.ENDED])
@pytest.mark.parametrize("how", ["refused", "failed", "lost", "ended", "expired"])
def test_whatever_ends_a_run_everybody_who_was_asked_is_told(state: State, how: str) -> None:
    run = run_in(state)
    match how:
        case "refused":
            orders = run.received(B, Refuse(fence(), "d1", "no_room", "too small", promised=3), 1.0)
            end = Ended(fence(), "no_room", "too small", B, 3, state is State.SERVING)
        case "failed":
            orders = run.received(B, Failed(fence(), 1, "model", "corrupt"), 1.0)
            end = Ended(fence(), "model", "corrupt", B, 0, state is State.SERVING)
        case "lost":
            assert run.lost(C, "not of this run") == []
            orders = run.lost(B, "the link was lost")
            end = Ended(fence(), "participant_lost", "the link was lost", B, 0, state is State.SERVING)
        case "ended":
            orders = run.end("withdrawn", "no longer wanted")
            end = Ended(fence(), "withdrawn", "no longer wanted", None, 0, state is State.SERVING)
        case _:
            orders = run.expire(1e9)
            if state is State.SERVING:
                assert orders == []
                return
            end = Ended(fence(), "timed_out", f"no progress while {state.value}", A, 0)
    opened = [CloseHead(fence())] if state in (State.CONNECTING, State.SERVING) else []
    told = [Order(A, Abort(fence(), end.reason)), Order(B, Abort(fence(), end.reason))]
    assert orders == [*opened, *told, end]
    assert run.state is State.ENDED
    assert (run.end("again", ""), run.lost(A, ""), run.expire(1e9), run.head_opened(1e9)) == ([], [], [], [])


def test_who_did_not_answer_is_the_one_to_blame() -> None:
    run = run_in(State.CLAIMING)
    run.received(A, Grant(fence(), "d1"), 0.0)
    assert run.expire(CLAIM_S - 0.001) == []
    assert run.expire(CLAIM_S)[-1] == Ended(fence(), "timed_out", "no progress while claiming", B)
    run = run_in(State.PREPARING)
    run.received(A, Ready(fence(), 0), 0.0)
    assert run.expire(LOAD_S)[-1] == Ended(fence(), "timed_out", "no progress while preparing", B)
    run = run_in(State.CONNECTING)
    for stage, node in enumerate((A, B, A)):
        run.received(node, Connected(fence(), stage), 0.0)
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
    Claim: claim(),
    Abort: Abort(fence(), "x"),
    Commit: Commit(fence()),
    Connect: Connect(fence()),
    Ping: Ping(1),
    Leave: Leave(),
    Unknown: Unknown("x"),
}
ENDING = {(state, kind) for state in State for kind in (Refuse, Failed) if state is not State.ENDED}


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("kind", list(FROM_B), ids=lambda kind: kind.__name__)
def test_a_message_moves_a_run_only_where_the_table_says(state: State, kind: type) -> None:
    run = run_in(state)
    orders = run.received(B, FROM_B[kind], 1.0)
    if (state, kind) in ENDING:
        assert run.state is State.ENDED
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
        before, now = run.state, now + 7.0
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
        assert (run.deadline is None) == (run.state in (State.SERVING, State.ENDED))
        ended += sum(isinstance(order, Ended) for order in orders)
        aborted += len(messages(orders, Abort))
    assert ended == (run.state is State.ENDED)
    assert aborted == 2 * ended
