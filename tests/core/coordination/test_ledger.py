from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.coordination import ledger as module
from meshnode.core.coordination.ledger import (
    DEPLOYMENT_CHARACTERS,
    DEPLOYMENTS,
    LEASE_S,
    RUNS_HELD,
    RUNS_OF_ONE,
    TERM_JUMP,
    Ledger,
    Word,
)
from meshnode.errors import ConfigError, PeerError, StaleFence
from meshnode.identity.ids import NodeId
from meshnode.io.disk.folder import SMALL_FILE
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.messages import (
    Claim,
    ClaimedStage,
    Connected,
    Failed,
    FenceOff,
    Fetched,
    Grant,
    Hop,
    Progress,
    Ready,
    Refuse,
)
from tests.core.coordination.claims import A, B, C, claim, fence, prepare

CAPACITY = 100


def ledger() -> Ledger:
    return Ledger(B, CAPACITY)


def nobody(_holder: NodeId) -> bool:
    return False


def answer(of: Ledger, asked: Claim, now: float = 0.0, lost: Callable[[NodeId], bool] = nobody) -> Grant | Refuse:
    told, superseded = of.claim(asked, now, lost)
    assert not set(superseded) & of.held.keys()
    return told


def serving(of: Ledger, asked: Claim) -> None:
    """The run of `asked` is committed."""
    assert isinstance(answer(of, asked), Grant)
    of.commit(asked.coordinator, asked.fence)


def taking_over(
    nodes: tuple[NodeId, ...] = (A, B), size: int = 10, term: int = 1, run: int = 1, deployment: str = "d1"
) -> Claim:
    """A claim in the place of the first run."""
    return msgspec.structs.replace(claim(nodes, A, term, run, deployment, size), releases=fence(1))


def refusal(of: Ledger, asked: Claim) -> str:
    before = of.refused
    told = answer(of, asked)
    assert isinstance(told, Refuse)
    assert (told.fence, told.deployment) == (asked.fence, asked.deployment)
    assert told.free_bytes == max(0, of.free_bytes)
    assert of.refused == before + 1
    return told.reason


def test_a_grant_reserves_what_this_node_runs_and_promises_the_term() -> None:
    own = ledger()
    assert answer(own, claim((A, B, B), size=30, term=5)) == Grant(fence(5), "d1")
    assert own.reserved == {"d1": 60}
    assert own.free_bytes == 40
    assert own.promised == {"d1": 5}
    assert own.held[fence(5)].states == {1: "claimed", 2: "claimed"}


def test_the_same_claim_again_is_granted_again_and_books_nothing() -> None:
    own = ledger()
    for _ in range(3):
        assert isinstance(answer(own, claim(size=60)), Grant)
    assert own.free_bytes == 40


def test_another_claim_of_the_same_term_and_run_is_refused() -> None:
    own = ledger()
    answer(own, claim(size=60))
    assert refusal(own, claim(size=10)) == "equal_term"
    assert own.free_bytes == 40


def test_a_term_that_was_granted_before_is_refused_also_after_its_release() -> None:
    own = ledger()
    answer(own, claim(term=3))
    own.release(fence(3))
    for term in (1, 2, 3):
        assert refusal(own, claim(term=term, run=2)) == "old_term"
    assert isinstance(answer(own, claim(term=4, run=2)), Grant)


def test_a_term_far_ahead_is_refused() -> None:
    own = ledger()
    assert refusal(own, claim(term=TERM_JUMP + 1)) == "term_jump"
    assert isinstance(answer(own, claim(term=TERM_JUMP)), Grant)
    assert refusal(own, claim(term=2 * TERM_JUMP + 1)) == "term_jump"


def test_a_deployment_that_another_coordinator_holds_here_is_refused() -> None:
    own = ledger()
    answer(own, claim())
    assert refusal(own, claim(coordinator=C, term=2, run=2)) == "held"
    own.release(fence(1))
    assert isinstance(answer(own, claim(coordinator=C, term=2, run=2)), Grant)


def test_the_next_run_needs_room_beside_the_one_that_is_held() -> None:
    own = ledger()
    serving(own, claim(size=60))
    assert refusal(own, claim(size=60, term=2, run=2)) == "no_room"
    assert own.promised == {"d1": 1}, "a refusal promises nothing"
    assert isinstance(answer(own, claim(size=40, term=2, run=2)), Grant)
    assert own.free_bytes == 0


def test_runs_that_reserve_next_to_nothing_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RUNS_HELD", 3)
    own = ledger()
    for run in range(3):
        answer(own, claim(size=1, run=run, deployment=f"d{run}"))
    assert refusal(own, claim(size=1, run=9, deployment="d9")) == "no_room"


def test_one_coordinator_cannot_fill_the_runs_of_a_node_with_claims_of_a_byte() -> None:
    own = ledger()
    for run in range(RUNS_HELD):
        told = answer(own, claim(size=1, run=run, deployment=f"d{run}"))
        assert isinstance(told, Grant) == (run < RUNS_OF_ONE)
    assert refusal(own, claim(size=1, run=99, deployment="d99")) == "too_many"
    assert isinstance(answer(own, claim(size=1, term=2, run=98, deployment="d3")), Grant), "in its own run's place"
    other = claim((B, C), coordinator=C, size=1, run=97, deployment="e")
    assert isinstance(answer(own, other), Grant)


def test_promised_deployments_are_bounded_and_known_ones_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEPLOYMENTS", 2)
    own = ledger()
    for run, name in enumerate(("d0", "d1")):
        answer(own, claim(run=run, deployment=name))
        own.release(fence(1, run))
    assert refusal(own, claim(run=7, deployment="d2")) == "too_many"
    assert isinstance(answer(own, claim(term=2, run=8, deployment="d1")), Grant)


def test_a_full_ledger_fits_the_disk() -> None:
    own = ledger()
    own.words = {f"{n:0{DEPLOYMENT_CHARACTERS}x}": Word(*[2**64 - 1] * 3) for n in range(DEPLOYMENTS)}
    assert len(own.encode()) <= SMALL_FILE


def stage(index: int, first: int, last: int, reserved: int = 1) -> ClaimedStage:
    return ClaimedStage(index, B, first, last, 1, 0, reserved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fence": Fence(Term(0), RunId("00" * 8))}, "malformed claim"),
        ({"fence": Fence(Term(1), RunId("XY" * 8))}, "malformed claim"),
        ({"fence": Fence(Term(1), RunId("0" * 17))}, "malformed claim"),
        ({"deployment": "d" * (DEPLOYMENT_CHARACTERS + 1)}, "malformed claim"),
        ({"model": "m" * 513}, "malformed claim"),
        ({"stages": claim((A, C)).stages}, "uses nothing here"),
        ({"stages": (stage(0, 0, 2), stage(2, 2, 4))}, "do not follow"),
        ({"stages": (stage(0, 0, 2), stage(1, 3, 4))}, "do not follow"),
        ({"stages": (stage(0, 0, 4), stage(1, 4, 4))}, "do not follow"),
        ({"stages": (stage(0, 0, 2), stage(1, 2, 4, reserved=0))}, "reserves less"),
        ({"stages": tuple(ClaimedStage(i, B, 2 * i, 2 * i + 2, 0, 0, 0) for i in range(2))}, "reserves less"),
        ({"releases": Fence(Term(-1), RunId("00" * 8))}, "malformed claim"),
        ({"releases": Fence(Term(1), RunId("x" * 60_000))}, "malformed claim"),
        ({"stages": (stage(0, 0, 2),)}, "does not cover"),
        ({"layers": 5}, "does not cover"),
    ],
)
def test_a_claim_of_impossible_shape_is_the_peers_error(changes: dict[str, object], message: str) -> None:
    own = ledger()
    with pytest.raises(PeerError, match=message):
        answer(own, msgspec.structs.replace(claim(), **changes))
    assert (own.held, own.promised) == ({}, {})


def test_orders_are_obeyed_by_exact_fence_from_the_coordinator_only() -> None:
    own = ledger()
    answer(own, claim(term=2))
    assert own.authorize(A, fence(2)).claim == claim(term=2)
    for peer, other in ((C, fence(2)), (A, fence(1)), (A, fence(3)), (A, fence(2, run=2))):
        before = own.refused
        with pytest.raises(StaleFence):
            own.authorize(peer, other)
        assert own.refused == before + 1
    own.release(fence(2))
    with pytest.raises(StaleFence):
        own.authorize(A, fence(2))


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": 0},
        {"stage": 7},
        {"first": 1},
        {"last": 3},
        {"layers": 9},
        {"stages": 1},
        {"manifest_digest": ""},
        {"options": msgspec.structs.replace(claim().options, context=9999)},
        {"upstream": Hop(b"short", "up", A)},
        {"downstream": Hop(bytes(17), "down", A)},
    ],
)
def test_an_order_that_differs_from_its_claim_is_refused(changes: dict[str, object]) -> None:
    own, asked = ledger(), claim()
    answer(own, asked)
    own.prepare(A, prepare(asked, 1))
    with pytest.raises(PeerError):
        own.prepare(A, msgspec.structs.replace(prepare(asked, 1), **changes))


def test_what_a_stage_here_reports_is_remembered_for_its_run_only() -> None:
    own = ledger()
    answer(own, claim())
    held = own.held[fence()]
    reports = [
        (Progress(fence(), 1, "fetching", 5, 10), "fetching"),
        (Fetched(fence(), 1), "fetched"),
        (Ready(fence(), 1), "ready"),
        (Connected(fence(), 1), "connected"),
        (Failed(fence(), 1, "stage_lost", "killed"), "failed"),
    ]
    for report, state in reports:
        own.note(msgspec.structs.replace(report, fence=fence(9)))
        own.note(report)
        assert held.states[1] == state
    assert held.progress[1].done == 5


def test_the_terms_survive_a_restart_and_the_reservations_do_not() -> None:
    own = ledger()
    answer(own, claim(term=4))
    again = ledger()
    again.restore(own.encode())
    assert again.promised == {"d1": 4}
    assert again.free_bytes == CAPACITY
    assert refusal(again, claim(term=4)) == "old_term"


def test_a_ledger_from_before_commits_were_kept_is_read() -> None:
    own = ledger()
    own.restore(msgspec.msgpack.encode({"d1": 4}))
    assert own.words == {"d1": Word(4)}


def test_the_next_claim_of_a_coordinator_ends_its_unfinished_one_and_nothing_that_serves() -> None:
    own = ledger()
    serving(own, claim(size=30))
    answer(own, claim(size=30, term=2, run=2))
    told, superseded = own.claim(claim(size=60, term=3, run=3), 0.0, nobody)
    assert isinstance(told, Grant)
    assert superseded == [fence(2, 2)]
    assert set(own.held) == {fence(1), fence(3, 3)}


def test_a_claim_of_another_manifest_under_the_same_deployment_is_refused() -> None:
    own = ledger()
    serving(own, claim())
    other = msgspec.structs.replace(claim(term=2, run=2), manifest_digest="ef" * 32)
    assert refusal(own, other) == "other_model"


def test_another_coordinator_waits_for_the_holders_lease_or_for_evidence_that_it_is_lost() -> None:
    own = ledger()
    serving(own, claim())
    other = claim(coordinator=C, term=2, run=2)
    assert refusal(own, other) == "held"
    told = answer(own, other)
    assert isinstance(told, Refuse)
    assert (told.holder_fence, told.holder) == (fence(1), A)
    assert isinstance(answer(own, other, lost=lambda holder: holder == A), Grant)
    own = ledger()
    serving(own, claim())
    assert isinstance(answer(own, other, now=LEASE_S), Grant)


def test_the_larger_of_two_runs_is_booked_where_one_takes_the_place_of_the_other() -> None:
    own = ledger()
    serving(own, claim(size=60))
    assert refusal(own, claim(size=70, term=2, run=2)) == "no_room"
    assert isinstance(answer(own, taking_over(size=70, term=2, run=2)), Grant)
    assert own.reserved == {"d1": 70}
    assert own.displaced(fence(2, 2)) == fence(1)
    own.release(fence(1))
    assert own.reserved == {"d1": 70}
    assert own.displaced(fence(2, 2)) is None


def test_a_run_is_booked_as_replaced_once_however_many_claim_its_place() -> None:
    own = ledger()
    serving(own, claim(size=60))
    serving(own, taking_over(size=60, term=2, run=2))
    assert own.free_bytes == 40
    assert refusal(own, taking_over(size=60, term=3, run=3)) == "no_room"


def test_a_claim_cannot_take_the_place_of_another_deployments_or_a_later_run() -> None:
    own = ledger()
    serving(own, claim(size=60))
    for bad in (taking_over(deployment="d2", term=2, run=2), taking_over(term=1, run=2)):
        with pytest.raises(PeerError, match="in the place of"):
            answer(own, bad)


def test_a_loaded_stage_with_the_same_layers_and_options_is_adopted_and_a_dead_one_is_not() -> None:
    own = ledger()
    serving(own, claim((B, A, B), size=10))
    answer(own, taking_over((B, C, B), size=10, term=2, run=2))
    assert own.adopted(fence(1), fence(2, 2)) == {}
    for stage in (0, 2):
        own.note(Ready(fence(1), stage))
    assert own.adopted(fence(1), fence(2, 2)) == {0: 0, 2: 2}
    own.note(Failed(fence(1), 2, "stage_lost", "killed"))
    assert own.adopted(fence(1), fence(2, 2)) == {0: 0}
    longer = msgspec.structs.replace(claim().options, context=512)
    answer(own, msgspec.structs.replace(taking_over((B, C, B), size=10, term=3, run=3), options=longer))
    assert own.adopted(fence(1), fence(3, 3)) == {}


def test_a_stage_whose_process_ended_books_no_memory() -> None:
    own = ledger()
    serving(own, claim(size=60))
    own.note(Failed(fence(1), 1, "stage_lost", "killed"))
    assert own.free_bytes == CAPACITY


def test_everything_below_a_fence_ends_and_never_comes_back() -> None:
    own = ledger()
    serving(own, claim(size=30))
    serving(own, claim(size=30, term=2, run=2))
    assert own.fence(A, FenceOff(fence(2, 2), "d1")) == [fence(1)]
    own.release(fence(1))
    assert own.words["d1"] == Word(2, 2, 1)
    assert own.fence(A, FenceOff(fence(2, 2), "d1")) == []
    assert refusal(own, claim(term=1, run=9)) == "old_term"


def test_a_fence_far_above_what_was_granted_uses_up_no_terms() -> None:
    own = ledger()
    serving(own, claim())
    with pytest.raises(StaleFence):
        own.fence(A, FenceOff(fence(1 + TERM_JUMP + 1, 2), "d1"))
    assert own.promised == {"d1": 1}


@pytest.mark.parametrize("peer", [A, C])
def test_who_may_fence_a_node_that_has_only_the_old_run(peer: NodeId) -> None:
    own = ledger()
    serving(own, claim())
    order = FenceOff(fence(2, 2), "d1")
    if peer == A:
        assert own.fence(A, order) == [fence(1)]
        assert own.promised == {"d1": 1}
    else:
        with pytest.raises(StaleFence):
            own.fence(C, order)


def test_a_fence_is_taken_only_from_the_coordinator_of_the_run_that_serves_here() -> None:
    own = ledger()
    serving(own, claim())
    with pytest.raises(StaleFence):
        own.fence(C, FenceOff(fence(1), "d1"))


def test_a_lease_ends_unless_its_coordinator_renews_it() -> None:
    own = ledger()
    serving(own, claim())
    assert own.deadline() == LEASE_S
    assert own.ended(LEASE_S - 0.001) == []
    assert own.renew(A, fence(), 5.0)
    assert not own.renew(C, fence(), 9.0)
    assert not own.renew(A, fence(7), 9.0)
    assert own.ended(LEASE_S) == []
    assert own.ended(5.0 + LEASE_S) == [fence()]


@pytest.mark.parametrize("damaged", [b"", b"\x81", b"\x93\x01\x02\x03", b"\x81\xa1d\xa1x"])
def test_a_damaged_ledger_is_told_with_what_to_do(damaged: bytes) -> None:
    with pytest.raises(ConfigError, match="damaged") as told:
        ledger().restore(damaged)
    assert told.value.hint


asked = st.builds(
    claim,
    nodes=st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=4).map(tuple).filter(lambda nodes: B in nodes),
    coordinator=st.sampled_from([A, C]),
    term=st.integers(1, 6),
    run=st.integers(1, 4),
    deployment=st.sampled_from(["d1", "d2", "d3"]),
    size=st.integers(1, 70),
)
steps = st.lists(asked | st.builds(fence, st.integers(1, 6), st.integers(1, 4)), max_size=40)


@given(steps)
def test_memory_is_never_over_committed_and_no_term_goes_back(history: list[Claim | Fence]) -> None:
    own = ledger()
    for step in history:
        before = dict(own.promised)
        if isinstance(step, Fence):
            own.release(step)
        elif isinstance(answer(own, step), Grant):
            assert own.held[step.fence].claim == step
        assert 0 <= own.free_bytes <= CAPACITY
        assert sum(own.reserved.values()) + own.free_bytes == CAPACITY
        assert all(own.promised[name] >= term for name, term in before.items())
        holders = {(run.claim.deployment, run.claim.coordinator) for run in own.held.values()}
        assert len(holders) == len({deployment for deployment, _ in holders}), "one coordinator for each deployment"


def test_only_other_runs_count_as_a_change() -> None:
    made = ledger()
    changes = [made.changes]
    made.claim(claim(term=1), 0.0, nobody)
    changes.append(made.changes)
    made.claim(claim(term=1), 0.0, nobody)
    made.commit(A, fence(1))
    assert made.changes == changes[-1]
    made.claim(claim(term=2, run=2), 1.0, nobody)
    changes.append(made.changes)
    made.release(fence(1))
    changes.append(made.changes)
    made.release(fence(1))
    assert made.changes == changes[-1]
    assert len(set(changes)) == 4
