"""The stand-in for llama.cpp: slices say what the whole says, and whatever goes wrong between them shows."""

from dataclasses import replace

import pytest

from meshnode.core.node import effects as do
from meshnode.core.serving.request import Sampled
from meshnode.wire.activation import Close, Open
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.sampling import Sampling
from sim import tokens
from sim.checks import Violation
from sim.profiles import CALM
from sim.tokens import Batch, Pipeline, Row, Slice, answer, embedded, token_of
from sim.trial import populate
from sim.world import World

FENCE = Fence(Term(1), RunId("0" * 16))
LAYERS = 6


def through(slices: list[Slice], batch: Batch) -> Batch:
    for each in slices:
        batch = each.compute(batch, fails=False)
    return batch


def generated(slices: list[Slice], lane: int, prompt: tuple[int, ...], count: int) -> list[int]:
    ids = list(prompt)
    opened = (Open(lane, Sampling()),)
    for position in range(len(prompt) + count - 1):
        row = Row(lane, position, True, embedded(ids[position]))
        done = through(slices, Batch(FENCE, position + 1, opened if not position else (), (row,)))
        if position >= len(prompt) - 1:
            ids.append(token_of(done.rows[0].value))
    return ids[len(prompt) :]


def serving(seed: int = 1) -> World:
    world = World(seed, CALM)
    populate(world, 4)
    world.agenda.run(5.0)
    world.serve(next(iter(world.machines.values())))
    world.agenda.run(15.0)
    assert world.requests.answered > 0
    return world


@pytest.mark.parametrize("cuts", [(), (3,), (1, 5), (1, 2, 3, 4, 5)])
def test_slices_say_what_the_whole_model_says_wherever_it_is_cut(cuts: tuple[int, ...]) -> None:
    bounds = (0, *cuts, LAYERS)
    slices = [Slice(index, bounds[index], bounds[index + 1]) for index in range(len(bounds) - 1)]

    for lane, prompt in ((0, (5, 6, 7)), (1, (5, 6, 8)), (0, (9,))):
        assert generated(slices, lane, prompt, 5) == answer(prompt, 5, LAYERS)


def test_a_token_depends_on_every_one_before_it_and_on_their_order() -> None:
    assert len({tuple(answer(prompt, 4, LAYERS)) for prompt in ((1, 2, 3), (1, 3, 2), (1, 1, 3), (2, 3), (1, 2))}) == 5


def test_a_row_that_does_not_follow_or_has_no_lane_is_refused() -> None:
    stage = Slice(0, 0, LAYERS)
    row = Row(0, 0, True, embedded(1))
    with pytest.raises(ValueError, match="lane 0, which is closed"):
        stage.compute(Batch(FENCE, 1, (), (row,)), fails=False)
    stage.compute(Batch(FENCE, 1, (Open(0, Sampling()),), (row,)), fails=False)
    for wrong in (row, replace(row, position=2)):
        with pytest.raises(ValueError, match="which is at 1"):
            stage.compute(Batch(FENCE, 2, (), (wrong,)), fails=False)
    stage.compute(Batch(FENCE, 3, (Close(0),), ()), fails=False)
    assert stage.lanes == {}


def test_requests_are_answered_while_a_model_is_served_and_end_with_its_run() -> None:
    world = serving()
    machine = next(iter(world.machines.values()))
    assert machine.mediator is not None
    key = next(iter(machine.mediator.deployments))
    fence = next(iter(machine.engine.heads))
    machine.engine.carry_out(do.CloseHead(fence))

    assert world.requests.open == {}
    assert key in machine.mediator.deployments


def test_a_microbatch_that_comes_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Pipeline._take

    def twice(pipeline: Pipeline, index: int, host: object, batch: Batch) -> None:
        taken(pipeline, index, host, batch)  # type: ignore[arg-type]
        if index == 1:
            taken(pipeline, index, host, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Pipeline, "_take", twice)
    with pytest.raises(Violation, match=r"tokens: the head of .* out of turn"):
        serving()


def test_a_cache_that_forgets_or_belongs_to_another_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    gives = tokens.layer_gives
    world = serving()
    monkeypatch.setattr(Slice, "_row", lambda _, row: replace(row, value=gives(0, row.position, 0, row.value)))

    with pytest.raises(Violation, match="tokens: r"):
        world.agenda.run(30.0)


def test_a_stage_that_computes_for_a_run_that_its_node_gave_up_is_found() -> None:
    world = serving()
    world.agenda.run(17.0)  # between two renewals of the lease: the next one would end the run
    fence = next(iter(next(iter(world.machines.values())).engine.heads))
    for machine in world.machines.values():
        assert machine.mediator is not None
        machine.mediator.ledger.held.pop(fence, None)

    with pytest.raises(Violation, match=r"stale: n. computes"):
        world.agenda.run(30.0)


def test_nothing_may_follow_the_end_of_a_request_and_every_one_ends() -> None:
    requests = serving().requests
    requests.open.clear()
    requests.accepted("x", ("d", FENCE), [4, 5], 0.0)
    requests.token("x", Sampled(4), 1.0)
    with pytest.raises(Violation, match="requests: 1 have no end"):
        requests.all_ended(FENCE)
    with pytest.raises(Violation, match="requests: x has had no end"):
        requests.accepted("y", ("d", FENCE), [1], 99.0)
    requests.token("x", Sampled(5, finish="length"), 2.0)
    with pytest.raises(Violation, match="requests: x goes on"):
        requests.token("x", Sampled(5), 3.0)
    requests.accepted("z", ("d", FENCE), [4, 5], 0.0)
    with pytest.raises(Violation, match="tokens: z ended after 1 of 2"):
        requests.token("z", Sampled(4, finish="stop"), 1.0)
