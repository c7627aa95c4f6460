from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import memory_stream_pair

from meshnode.core.serving.options import UNREAD_TOKENS, ServingOptions
from meshnode.core.serving.request import Generation
from meshnode.errors import Overloaded, StageError, StageLost, TimedOut, Unavailable
from meshnode.io.stage.pipeline import HeadPipeline
from meshnode.wire.activation import HEADER_BYTES, Header, Heartbeat, Rows, decode, encode
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.sampling import Sampling
from tests.core.serving.stages import END, FENCE, VOCABULARY, Stages, answer


class Wired:
    """Perfect stages at the far ends of the head's two streams."""

    def __init__(self, **changes) -> None:
        to_first, self.first = memory_stream_pair()
        from_last, self.last = memory_stream_pair()
        values = {"stages": 2, "context": 4096, "vocabulary": VOCABULARY, "end_tokens": frozenset({END}), "chunk": 8}
        options = ServingOptions(**(values | changes))
        self.pipeline = HeadPipeline(options, FENCE, to_first, from_last)
        self.stages = Stages(options.context, options.chunk)
        self.halted = trio.Event()
        self.beats = 0
        self.fail_next = False

    async def read_frame(self):
        header = Header.parse(await self.read(HEADER_BYTES))
        return decode(header, await self.read(header.body_bytes))

    async def read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            data += await self.first.receive_some(count - len(data))
        return bytes(data)

    async def send(self, frame) -> None:
        await self.last.send_all(b"".join(encode(frame)))

    async def greet(self, fence: Fence = FENCE) -> None:
        await self.last.send_all(encode(Heartbeat(fence))[0])
        await self.first.send_all(encode(Heartbeat(fence))[0])

    async def serve(self) -> None:
        await self.greet()
        while True:
            frame = await self.read_frame()
            if isinstance(frame, Heartbeat):
                self.beats += 1
                continue
            assert isinstance(frame, Rows)
            self.stages.take([frame])
            if self.halted.is_set():
                continue
            if self.fail_next and frame.positions:
                self.fail_next = False
                await self.send(self.stages.fail_oldest())
            else:
                await self.send(self.stages.answer_oldest())

    async def generate(self, name, prompt=(1, 2, 3), max_tokens=4):
        async with self.pipeline.generate(Generation(name, prompt, max_tokens, Sampling())) as tokens:
            return [sampled.token async for sampled in tokens]


@asynccontextmanager
async def wired(**changes):
    it = Wired(**changes)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.serve)
        await nursery.start(it.pipeline.run)
        yield it
        nursery.cancel_scope.cancel()


async def test_tokens_come_in_order_and_end() -> None:
    async with wired() as it:
        assert await it.generate("a", tuple(range(30)), 20) == answer(tuple(range(30)), 20)


async def test_generations_run_side_by_side() -> None:
    got = {}

    async def one(it, name, prompt) -> None:
        got[name] = await it.generate(name, prompt, 25)

    async with wired() as it, trio.open_nursery() as nursery:
        for number in range(1, 9):
            nursery.start_soon(one, it, f"r{number}", tuple(range(number)))
    assert got == {f"r{number}": answer(tuple(range(number)), 25) for number in range(1, 9)}


async def test_r9_leaving_the_context_frees_the_lane() -> None:
    async with wired(lanes=1) as it:
        async with it.pipeline.generate(Generation("a", (1,), 1000, Sampling())) as tokens:
            assert (await anext(tokens)).token == answer((1,), 1)[0]
        assert it.pipeline.statistics().lanes_busy == 0
        assert await it.generate("b", (7, 7), 3) == answer((7, 7), 3)
        assert it.pipeline.statistics().cancelled == 1


async def test_a_cancelled_consumer_breaks_no_stream() -> None:
    async with wired() as it:
        for number in range(20):
            with trio.CancelScope() as scope:
                async with it.pipeline.generate(Generation(f"a{number}", (1, 2), 1000, Sampling())) as tokens:
                    async for _ in tokens:
                        scope.cancel()
        assert await it.generate("b", (7, 7), 3) == answer((7, 7), 3)


async def test_r26_cancelling_one_leaves_its_siblings() -> None:
    async with wired() as it, it.pipeline.generate(Generation("a", (1,), 50, Sampling())) as first:
        async with it.pipeline.generate(Generation("b", (2,), 50, Sampling())) as second:
            await anext(second)
        assert [sampled.token async for sampled in first] == answer((1,), 50)


async def test_a_refused_request_leaves_nothing_behind() -> None:
    async with wired(lanes=1, queue_per_lane=0) as it:
        async with it.pipeline.generate(Generation("a", (1,), 50, Sampling())) as tokens:
            await anext(tokens)
            with pytest.raises(Overloaded):
                await it.generate("b")
        assert await it.generate("b") == answer((1, 2, 3), 4)


async def test_a_failed_microbatch_is_a_typed_error_and_the_pipeline_serves_on() -> None:
    async with wired() as it:
        it.fail_next = True
        with pytest.raises(StageError, match="a decode failed"):
            await it.generate("a")
        assert await it.generate("b") == answer((1, 2, 3), 4)


async def test_r95_a_lost_stream_ends_everyone_at_once() -> None:
    it = Wired(lanes=1)
    outcomes = []

    async def consume(name) -> None:
        with pytest.raises(StageLost):
            await it.generate(name)
        outcomes.append(name)

    it.halted.set()
    with pytest.RaisesGroup(StageLost):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.serve)
            await nursery.start(it.pipeline.run)
            async with trio.open_nursery() as consumers:
                for name in ("runs", "waits"):
                    consumers.start_soon(consume, name)
                await trio.testing.wait_all_tasks_blocked()
                await it.last.aclose()
    assert sorted(outcomes) == ["runs", "waits"]
    with pytest.raises(Unavailable):
        await it.generate("late")


async def test_a_neighbour_of_another_run_is_refused_at_the_greeting() -> None:
    it = Wired()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.greet, Fence(Term(2), RunId("11" * 8)))
        with pytest.raises(StageLost, match="fence"):
            await it.pipeline.run()


async def test_frames_that_a_last_stage_never_sends_end_the_pipeline() -> None:
    for nonsense in (b"x" * HEADER_BYTES, encode(Heartbeat(Fence(Term(2), RunId("11" * 8))))[0]):
        it = Wired()
        with pytest.RaisesGroup(StageLost):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(it.greet)
                await nursery.start(it.pipeline.run)
                await it.last.send_all(nonsense)


async def test_a_stage_that_stops_answering_is_a_time_out_for_each_token(autojump_clock) -> None:
    async with wired() as it:
        it.pipeline._silence_s = 1e9
        it.halted.set()
        with pytest.raises(TimedOut):
            await it.generate("a")
        assert it.pipeline.statistics().lanes_busy == 0


async def test_a_token_that_came_reaches_its_consumer_although_the_next_row_cannot_be_sent() -> None:
    it, got = Wired(), []

    async def consume() -> None:
        async with it.pipeline.generate(Generation("a", (1, 2), 9, Sampling())) as tokens:
            async for sampled in tokens:
                got.append(sampled.token)

    async def broken(_data) -> None:
        raise trio.BrokenResourceError

    with pytest.RaisesGroup(pytest.RaisesGroup(StageLost), StageLost):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.greet)
            await nursery.start(it.pipeline.run)
            async with trio.open_nursery() as consumers:
                consumers.start_soon(consume)
                assert isinstance(await it.read_frame(), Heartbeat)
                it.stages.take([await it.read_frame()])
                it.pipeline._to_first.send_all = broken
                await it.send(it.stages.answer_oldest())
    assert got == answer((1, 2), 1)


async def test_an_idle_head_gives_a_sign_of_life_and_notices_silence(autojump_clock) -> None:
    it = Wired()
    with pytest.RaisesGroup(StageLost):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.serve)
            await nursery.start(it.pipeline.run)
    assert it.beats >= 8


async def test_a_consumer_that_rests_holds_a_bounded_number_of_tokens() -> None:
    async with wired() as it, it.pipeline.generate(Generation("a", (1,), 500, Sampling())) as tokens:
        await trio.testing.wait_all_tasks_blocked()
        assert it.pipeline.statistics().generated_tokens == UNREAD_TOKENS
        assert [sampled.token async for sampled in tokens] == answer((1,), 500)
