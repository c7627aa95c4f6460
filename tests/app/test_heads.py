"""Which head a request goes to while one run follows another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from meshnode.app.heads import Heads, ServedRun
from meshnode.app.hops import HopSeats
from meshnode.core.serving.request import Generation, Sampled
from meshnode.errors import Unavailable
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
    heads = Heads(lambda: None, HopSeats(), nowhere, lambda _: None, nowhere)
    runs = []
    for each in fences:
        made = claim(term=each.term, run=int(each.run, 16))
        run = ServedRun(SimpleNamespace(), Pipeline(), made, 0, heads.present)
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
