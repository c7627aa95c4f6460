from __future__ import annotations

import pytest

from meshnode.app.replicas import FRESH_S, HEADER, Load, Replicas, header_of
from meshnode.identity.ids import NodeId

A, B = NodeId("a"), NodeId("b")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def told(replicas: Replicas, node: NodeId, load: Load, model: str = "m") -> None:
    replicas.hear(node, model, (header_of({model: load, "other": Load(9, 9, 9)}),))


def test_a_pipeline_of_s_stages_takes_s_streams_before_anybody_waits() -> None:
    waits = [Load(stages=3, busy=busy, token_us=900).wait_us(7) for busy in range(6)]
    assert waits == [900, 900, 900, 1200, 1500, 1800]
    assert Load(busy=1).wait_us(7) == 14


def test_the_shorter_expected_wait_is_asked_first_whoever_is_slower_alone() -> None:
    replicas = Replicas(Clock())
    told(replicas, A, Load(1, 3, 10_000))
    told(replicas, B, Load(1, 0, 30_000))
    assert replicas.ranked(iter((A, B)), "m") == [B, A]
    told(replicas, A, Load(1, 1, 10_000))
    assert replicas.ranked(iter((A, B)), "m") == [A, B]


def test_a_head_here_is_asked_until_one_elsewhere_answers_sooner() -> None:
    replicas = Replicas(Clock())
    told(replicas, B, Load(1, 1, 10_000))
    assert replicas.ranked([B], "m", Load(1, 1, 10_000)) == [None, B]
    assert replicas.ranked([B], "m", Load(1, 2, 10_000)) == [B, None]
    assert replicas.ranked([A], "m", Load(1, 0, 10_000)) == [None, A]
    assert replicas.ranked([A], "m", Load(1, 1, 10_000)) == [A, None], "who told nothing is as fast as the fastest"


def test_own_requests_count_at_once_and_are_given_back() -> None:
    replicas = Replicas(Clock())
    with replicas.asking(A, "m"), replicas.asking(A, "m"):
        assert replicas.load(A, "m").busy == 2
        assert replicas.ranked(iter((A, B)), "m") == [B, A]
        assert replicas.load(A, "other").busy == 0
    with pytest.raises(KeyError), replicas.asking(A, "m"):
        raise KeyError
    assert replicas.load(A, "m").busy == 0
    assert not replicas._own


def test_how_busy_somebody_was_is_forgotten_how_fast_it_is_not() -> None:
    clock = Clock()
    replicas = Replicas(clock)
    told(replicas, A, Load(2, 7, 5_000))
    assert replicas.load(A, "m") == Load(2, 7, 5_000)
    clock.now += FRESH_S + 1
    assert replicas.load(A, "m") == Load(2, 0, 5_000)


@pytest.mark.parametrize(
    "text", ["", "x", "[]", '{"m": 1}', '{"m": [0, 0, 0]}', '{"m": [1, -1, 0]}', '{"m": [1, 0, 1e99]}', "[" * 3000]
)
def test_what_is_no_load_changes_nothing(text: str) -> None:
    replicas = Replicas(Clock())
    told(replicas, A, Load(2, 1, 5_000))
    replicas.hear(A, "m", ((HEADER, text),))
    replicas.hear(A, "m", ())
    assert replicas.load(A, "m") == Load(2, 1, 5_000)
    assert list(replicas._told) == [(A, "m")], "nothing is kept of models that were not asked for"


def test_models_of_any_name_fit_into_a_header() -> None:
    name, value = header_of({"modèle \u2713": Load(1, 2, 3)})
    assert (name, value.isascii(), value.isprintable()) == (HEADER, True, True)
    replicas = Replicas(Clock())
    replicas.hear(A, "modèle \u2713", ((name, value),))
    assert replicas.load(A, "modèle \u2713") == Load(1, 2, 3)
