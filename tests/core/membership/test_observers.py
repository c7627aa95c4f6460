from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.membership.observers import OBSERVERS, RANKED, Observers
from tests.core.node.mesh import name_to_id

NODES = [name_to_id(f"n{index}") for index in range(24)]
histories = st.lists(st.tuples(st.booleans(), st.sampled_from(NODES)), max_size=60)


def ring(*nodes: str) -> Observers:
    made = Observers()
    for node in nodes:
        made.add(name_to_id(node) if len(node) < 52 else node)  # type: ignore[arg-type]
    return made


@given(histories)
def test_the_ring_depends_on_who_is_in_it_and_not_on_how_they_came(history: list[tuple[bool, str]]) -> None:
    made, there = Observers(), []
    for joins, node in history:
        if joins:
            made.add(node)  # type: ignore[arg-type]
            there = [*(each for each in there if each != node), node]
        else:
            made.remove(node)  # type: ignore[arg-type]
            there = [each for each in there if each != node]
    fresh = ring(*sorted(there))
    assert len(made) == len(there)
    for node in NODES:
        assert made.of(node) == fresh.of(node)
        assert sorted(made.watched_by(node)) == sorted(fresh.watched_by(node))


def test_everybody_is_watched_by_four_others_and_watches_about_as_many() -> None:
    made = ring(*NODES)
    for node in NODES:
        assert len(set(made.of(node)) - {node}) == OBSERVERS == made.count()
        assert all(node in made.watched_by(observer) for observer in made.of(node))
    assert max(len(made.watched_by(node)) for node in NODES) <= 3 * OBSERVERS


def test_in_a_small_mesh_all_others_watch() -> None:
    made = ring(*NODES[:3])
    assert made.count() == 2
    assert set(made.of(NODES[0])) == {NODES[1], NODES[2]}
    assert ring(NODES[0]).of(NODES[0]) == []


def test_the_next_in_rank_are_believed_and_nobody_below() -> None:
    made = ring(*NODES)
    believed = [node for node in NODES if made.believed(node, NODES[0])]
    assert len(believed) == RANKED
    assert set(made.of(NODES[0])) < set(believed)
    made.remove(NODES[0])
    assert [node for node in NODES if made.believed(node, NODES[0])] == believed, "who was buried can still be doubted"


def test_a_stranger_watches_nobody() -> None:
    made = ring(*NODES[:5])
    assert made.watched_by(NODES[20]) == []
    assert not made.believed(NODES[20], NODES[0])
