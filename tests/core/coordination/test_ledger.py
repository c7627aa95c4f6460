from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.coordination import ledger as module
from meshnode.core.coordination.ledger import DEPLOYMENT_CHARACTERS, DEPLOYMENTS, TERM_JUMP, Ledger
from meshnode.errors import ConfigError, PeerError, StaleFence
from meshnode.io.disk.folder import SMALL_FILE
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.messages import Claim, ClaimedStage, Connected, Failed, Grant, Hop, Progress, Ready, Refuse
from tests.core.coordination.claims import A, B, C, claim, fence, prepare

CAPACITY = 100


def ledger() -> Ledger:
    return Ledger(B, CAPACITY)


def refusal(of: Ledger, asked: Claim) -> str:
    before = of.refused
    answer = of.claim(asked.coordinator, asked)
    assert isinstance(answer, Refuse)
    assert (answer.fence, answer.deployment) == (asked.fence, asked.deployment)
    assert answer.free_bytes == max(0, of.free_bytes)
    assert of.refused == before + 1
    return answer.reason


def test_a_grant_reserves_what_this_node_runs_and_promises_the_term() -> None:
    own = ledger()
    assert own.claim(A, claim((A, B, B), size=30, term=5)) == Grant(fence(5), "d1")
    assert own.reserved == {"d1": 60}
    assert own.free_bytes == 40
    assert own.promised == {"d1": 5}
    assert own.held[fence(5)].states == {1: "claimed", 2: "claimed"}


def test_the_same_claim_again_is_granted_again_and_books_nothing() -> None:
    own = ledger()
    for _ in range(3):
        assert isinstance(own.claim(A, claim(size=60)), Grant)
    assert own.free_bytes == 40


def test_another_claim_of_the_same_term_and_run_is_refused() -> None:
    own = ledger()
    own.claim(A, claim(size=60))
    assert refusal(own, claim(size=10)) == "equal_term"
    assert own.free_bytes == 40


def test_a_term_that_was_granted_before_is_refused_also_after_its_release() -> None:
    own = ledger()
    own.claim(A, claim(term=3))
    own.release(fence(3))
    for term in (1, 2, 3):
        assert refusal(own, claim(term=term, run=2)) == "old_term"
    assert isinstance(own.claim(A, claim(term=4, run=2)), Grant)


def test_a_term_far_ahead_is_refused() -> None:
    own = ledger()
    assert refusal(own, claim(term=TERM_JUMP + 1)) == "term_jump"
    assert isinstance(own.claim(A, claim(term=TERM_JUMP)), Grant)
    assert refusal(own, claim(term=2 * TERM_JUMP + 1)) == "term_jump"


def test_a_deployment_that_another_coordinator_holds_here_is_refused() -> None:
    own = ledger()
    own.claim(A, claim())
    assert refusal(own, claim(coordinator=C, term=2, run=2)) == "held"
    own.release(fence(1))
    assert isinstance(own.claim(C, claim(coordinator=C, term=2, run=2)), Grant)


def test_the_next_run_needs_room_beside_the_one_that_is_held() -> None:
    own = ledger()
    own.claim(A, claim(size=60))
    assert refusal(own, claim(size=60, term=2, run=2)) == "no_room"
    assert own.promised == {"d1": 1}, "a refusal promises nothing"
    assert isinstance(own.claim(A, claim(size=40, term=2, run=2)), Grant)
    assert own.free_bytes == 0


def test_runs_that_reserve_nothing_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RUNS_HELD", 3)
    own = ledger()
    for run in range(3):
        own.claim(A, claim(size=0, run=run, deployment=f"d{run}"))
    assert refusal(own, claim(size=0, run=9, deployment="d9")) == "no_room"


def test_promised_deployments_are_bounded_and_known_ones_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEPLOYMENTS", 2)
    own = ledger()
    for run, name in enumerate(("d0", "d1")):
        own.claim(A, claim(run=run, deployment=name))
        own.release(fence(1, run))
    assert refusal(own, claim(run=7, deployment="d2")) == "too_many"
    assert isinstance(own.claim(A, claim(term=2, run=8, deployment="d1")), Grant)


def test_a_full_ledger_fits_the_disk() -> None:
    own = ledger()
    own.promised = {f"{n:0{DEPLOYMENT_CHARACTERS}x}": 2**64 - 1 for n in range(DEPLOYMENTS)}
    assert len(own.encode()) <= SMALL_FILE


def stage(index: int, first: int, last: int, reserved: int = 1) -> ClaimedStage:
    return ClaimedStage(index, B, first, last, 1, 0, reserved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coordinator": C}, "another node's name"),
        ({"fence": Fence(Term(0), RunId("00" * 8))}, "malformed claim"),
        ({"fence": Fence(Term(1), RunId("XY" * 8))}, "malformed claim"),
        ({"fence": Fence(Term(1), RunId("0" * 17))}, "malformed claim"),
        ({"deployment": "d" * (DEPLOYMENT_CHARACTERS + 1)}, "malformed claim"),
        ({"model": "m" * 513}, "malformed claim"),
        ({"stages": claim((A, C)).stages}, "uses nothing here"),
        ({"stages": (stage(0, 0, 2), stage(2, 2, 4))}, "do not follow"),
        ({"stages": (stage(0, 0, 2), stage(1, 3, 4))}, "do not follow"),
        ({"stages": (stage(0, 0, 4), stage(1, 4, 4))}, "do not follow"),
        ({"stages": (stage(0, 0, 2), stage(1, 2, 4, reserved=-5))}, "do not follow"),
        ({"stages": (stage(0, 0, 2),)}, "does not cover"),
        ({"layers": 5}, "does not cover"),
    ],
)
def test_a_claim_of_impossible_shape_is_the_peers_error(changes: dict[str, object], message: str) -> None:
    own = ledger()
    with pytest.raises(PeerError, match=message):
        own.claim(A, msgspec.structs.replace(claim(), **changes))
    assert (own.held, own.promised) == ({}, {})


def test_orders_are_obeyed_by_exact_fence_from_the_coordinator_only() -> None:
    own = ledger()
    own.claim(A, claim(term=2))
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
    own.claim(A, asked)
    own.prepare(A, prepare(asked, 1))
    with pytest.raises(PeerError):
        own.prepare(A, msgspec.structs.replace(prepare(asked, 1), **changes))


def test_what_a_stage_here_reports_is_remembered_for_its_run_only() -> None:
    own = ledger()
    own.claim(A, claim())
    held = own.held[fence()]
    reports = [
        (Progress(fence(), 1, "fetching", 5, 10), "fetching"),
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
    own.claim(A, claim(term=4))
    again = ledger()
    again.restore(own.encode())
    assert again.promised == {"d1": 4}
    assert again.free_bytes == CAPACITY
    assert refusal(again, claim(term=4)) == "old_term"


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
    size=st.integers(0, 70),
)
steps = st.lists(asked | st.builds(fence, st.integers(1, 6), st.integers(1, 4)), max_size=40)


@given(steps)
def test_memory_is_never_over_committed_and_no_term_goes_back(history: list[Claim | Fence]) -> None:
    own = ledger()
    for step in history:
        before = dict(own.promised)
        if isinstance(step, Fence):
            own.release(step)
        elif isinstance(own.claim(step.coordinator, step), Grant):
            assert own.held[step.fence].claim == step
        assert 0 <= own.free_bytes <= CAPACITY
        assert sum(own.reserved.values()) + own.free_bytes == CAPACITY
        assert all(own.promised[name] >= term for name, term in before.items())
        holders = {(run.claim.deployment, run.claim.coordinator) for run in own.held.values()}
        assert len(holders) == len({deployment for deployment, _ in holders}), "one coordinator for each deployment"
