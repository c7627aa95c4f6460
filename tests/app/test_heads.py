"""Which head a request goes to while one run follows another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from meshnode.app.heads import DOUBT_S, Heads, ServedRun
from meshnode.app.hops import HopSeats
from meshnode.app.probes import Probes
from meshnode.core.serving.request import Generation, Sampled
from meshnode.errors import Overloaded, StageError, Unavailable
from meshnode.wire.fence import Fence
from meshnode.wire.sampling import Sampling
from tests.core.coordination.claims import claim, fence

REQUEST = Generation("r", (1,), 1, Sampling())


class Pipeline:
    """Streams that last until they are let go."""

    def __init__(self) -> None:
        self.entered = 0
        self.reason = ""

    @asynccontextmanager
    async def generate(self, request: Generation) -> AsyncIterator[AsyncIterator[Sampled]]:
        self.entered += 1

        async def tokens() -> AsyncIterator[Sampled]:
            await trio.sleep_forever()
            yield Sampled(0)

        yield tokens()

    def drain(self, reason: str) -> None:
        self.reason = reason


async def nowhere(*_: object) -> Any:
    raise AssertionError("nothing is dialed here")


def heads_with(*fences: Fence) -> tuple[Heads, list[ServedRun]]:
    """Heads that were opened and take no request yet."""
    heads = Heads(lambda: None, HopSeats(), nowhere, lambda _: None, nowhere, Probes(Path()))
    runs = []
    for each in fences:
        made = claim(term=each.term, run=int(each.run, 16))
        run = ServedRun(SimpleNamespace(vocabulary=None), Pipeline(), made, 0, heads.present)
        heads._opened[each] = run
        runs.append(run)
    return heads, runs


def test_a_head_takes_requests_from_serve_to_drain() -> None:
    heads, (run,) = heads_with(fence())
    assert heads.present("d1") is None
    heads.serve(fence())
    assert heads.present("d1") is run
    heads.drain(fence())
    assert heads.present("d1") is None
    heads.serve(fence())
    assert heads.present("d1") is run
    assert not run.draining


async def test_a_request_that_was_looked_up_before_the_change_goes_through_the_new_run() -> None:
    heads, (old, new) = heads_with(fence(1, 1), fence(2, 2))
    heads.serve(fence(1, 1))
    found = heads.present("d1")
    assert found is old
    heads.serve(fence(2, 2))
    heads.drain(fence(1, 1))
    async with found.generate(REQUEST):
        assert (old.pipeline.entered, new.pipeline.entered) == (0, 1)


async def test_a_run_is_drained_when_its_last_stream_ended_and_not_before() -> None:
    heads, (run,) = heads_with(fence())
    heads.serve(fence())
    async with run.generate(REQUEST):
        async with run.generate(REQUEST):
            heads.drain(fence())
            assert not run.drained.is_set()
        assert not run.drained.is_set()
    assert run.drained.is_set()


def test_a_run_without_streams_is_drained_at_once() -> None:
    heads, (run,) = heads_with(fence())
    heads.serve(fence())
    heads.drain(fence())
    assert run.drained.is_set()


async def test_where_no_run_takes_requests_the_client_is_told_to_come_again() -> None:
    heads, (run,) = heads_with(fence())
    heads.serve(fence())
    heads.drain(fence())
    with pytest.raises(Unavailable):
        async with run.generate(REQUEST):
            raise AssertionError("it was let in")


def test_a_closed_head_is_gone_and_refuses_what_it_still_gets() -> None:
    heads, (run,) = heads_with(fence())
    heads.serve(fence())
    heads.close(fence())
    heads.serve(fence())
    assert heads.present("d1") is None
    assert run.pipeline.reason


class Asked(Probes):
    """Gives the outcomes it was told, one after the other."""

    def __init__(self, *outcomes: Exception | None) -> None:
        super().__init__(Path())
        self.outcomes = list(outcomes)
        self.times: list[float] = []

    async def ask(self, *_: object) -> None:
        self.times.append(trio.current_time())
        outcome = self.outcomes.pop(0)
        if outcome is not None:
            raise outcome


async def fail_a_request(run: ServedRun) -> None:
    with pytest.raises(StageError):
        async with run.generate(REQUEST):
            raise StageError("decode_failed", "a stage failed it")


async def test_a_run_whose_stages_fail_a_request_is_probed_again_but_not_all_the_time(
    autojump_clock: MockClock,
) -> None:
    heads, (run,) = heads_with(fence())
    heads.serve(fence())
    heads._probes = probes = Asked(None, Overloaded("no lane"), None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heads._look_again, run)
        await wait_all_tasks_blocked()
        assert probes.times == []
        for _ in range(3):
            await fail_a_request(run)
            await fail_a_request(run)
            await trio.sleep(DOUBT_S)
        await trio.sleep(10 * DOUBT_S)
        nursery.cancel_scope.cancel()
    assert len(probes.times) == 3
    assert min(later - former for former, later in pairwise(probes.times)) >= DOUBT_S


async def test_a_run_that_fails_the_probe_later_ends() -> None:
    heads, (run,) = heads_with(fence())
    heads.serve(fence())
    heads._probes = Asked(StageError("probe_failed", "token 1 comes of one chunk, token 2 of two"))
    await fail_a_request(run)
    with pytest.raises(StageError) as failed:
        await heads._look_again(run)
    assert failed.value.reason == "probe_failed"
