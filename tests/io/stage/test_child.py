"""Activation streams of a real stage process: what it computes, and everything it refuses."""

import contextlib
import os
import signal
import ssl
import sys

import numpy as np
import psutil
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.app.bench.throwaway import ThrowawayMesh
from meshnode.errors import StageError, StageLost
from meshnode.identity.certificates import head_name, stage_name
from meshnode.identity.ids import NodeId
from meshnode.io.stage.computing import EXIT_STUCK
from meshnode.io.stage.process import MODULE
from meshnode.io.transport.tls import stage_context
from meshnode.wire.activation import (
    HEADER_BYTES,
    Close,
    FailedFrame,
    Failure,
    Heartbeat,
    LaneSample,
    Open,
    Rows,
    SampledFrame,
    Trim,
    encode,
)
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.stage_protocol import DOWNSTREAM, UPSTREAM, Adopt
from tests.factory import build
from tests.identity.mesh import TestMesh
from tests.io.stage.neighbour import (
    GREEDY,
    PATIENCE_S,
    Events,
    connect,
    introduce,
    prompt,
    secured,
    spawned,
    tcp_pair,
    whole_model,
)

TOY = "tests.io.stage.toy_stage"
OTHER_RUN = RunId("ffffffffffffffff")


@pytest.fixture(scope="module")
def mesh():
    return ThrowawayMesh.make()


@contextlib.asynccontextmanager
async def serving(mesh, events=None, module=TOY, path="", **changes):
    """A loaded and connected stage, and the head's two streams."""
    async with spawned(events or Events(), module=module) as stage:
        await stage.load(whole_model(path, **changes))
        await introduce(stage, mesh)
        to_stage, from_stage = await connect(stage, mesh)
        try:
            yield stage, to_stage, from_stage
        finally:
            for stream in (to_stage, from_stage):
                await trio.aclose_forcefully(stream.tls)


async def test_a_prompt_and_its_continuation_are_answered_in_order(mesh):
    async with serving(mesh) as (stage, head, back):
        await head.send(prompt(mesh.fence, 1, [4, 5, 6]))
        assert await back.read() == SampledFrame(mesh.fence, 1, (LaneSample(0, 2, 7),))
        await head.send(prompt(mesh.fence, 2, [7], start=3, opened=False))
        assert await back.read() == SampledFrame(mesh.fence, 2, (LaneSample(0, 3, 8),))
        statistics = await stage.stats()
        assert (statistics.microbatches, statistics.rows, statistics.samples, statistics.cells_used) == (2, 4, 2, 4)
        assert await stage.shutdown() == 0


@pytest.mark.native
async def test_a_real_model_gives_the_same_tokens_in_any_lane(mesh, tmp_path):
    path = build(tmp_path / "tiny.gguf", layers=2)
    async with serving(mesh, module=MODULE, path=path) as (stage, head, back):
        for number, lane in enumerate((0, 3), start=1):
            await head.send(prompt(mesh.fence, number, [4, 5, 6], lane=lane))
        tokens = [(await back.read()).samples[0].token for _ in range(2)]
        assert tokens[0] == tokens[1]
        assert await stage.shutdown() == 0


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are known on Linux only")
async def test_what_computes_has_the_usual_priority_although_the_load_gave_way(mesh, tmp_path):
    path = build(tmp_path / "tiny.gguf", layers=2)
    async with serving(mesh, module=MODULE, path=path, threads=2) as (stage, head, back):
        await head.send(prompt(mesh.fence, 1, [4, 5, 6]))
        await back.read()
        threads = [each.id for each in psutil.Process(stage.pid).threads()]
        assert len(threads) > 3
        assert {os.getpriority(os.PRIO_PROCESS, each) for each in threads} == {os.getpriority(os.PRIO_PROCESS, 0)}
        assert await stage.shutdown() == 0


async def test_a_frame_of_operations_only_is_acknowledged(mesh):
    async with serving(mesh) as (_, head, back):
        frame = prompt(mesh.fence, 1, [])
        await head.send(frame)
        assert await back.read() == SampledFrame(mesh.fence, 1, ())


async def test_r90_a_gap_an_overlap_and_a_closed_lane_fail_typed_and_the_lane_goes_on(mesh):
    async with serving(mesh) as (stage, head, back):
        await head.send(prompt(mesh.fence, 1, [4, 5]))
        await back.read()
        for number, (start, lane) in enumerate([(3, 0), (1, 0), (0, 1)], start=2):
            await head.send(prompt(mesh.fence, number, [6], start=start, lane=lane, opened=False))
            failed = await back.read()
            assert isinstance(failed, FailedFrame)
            assert failed.failure.lanes == (lane,)
            assert failed.failure.reason == ("lane_closed" if lane else "position_gap")
        await head.send(prompt(mesh.fence, 5, [6], start=2, opened=False))
        assert isinstance(await back.read(), SampledFrame)
        assert (await stage.stats()).failures == 3


async def test_operations_are_done_even_when_the_rows_of_their_frame_fail(mesh):
    async with serving(mesh) as (_, head, back):
        await head.send(prompt(mesh.fence, 1, [4, 5]))
        await back.read()
        gap = prompt(mesh.fence, 2, [6], start=9, opened=False)
        operations = (Trim(0, 1), Open(2, GREEDY))
        await head.send(Rows(gap.fence, 2, operations, gap.positions, gap.lanes, gap.logits, gap.tokens))
        assert (await back.read()).failure.operations == operations
        await head.send(prompt(mesh.fence, 3, [6], start=1, opened=False))
        assert isinstance(await back.read(), SampledFrame)
        await head.send(prompt(mesh.fence, 4, [6], lane=2, opened=False))
        assert isinstance(await back.read(), SampledFrame)


async def test_a_failed_frame_of_an_earlier_stage_passes_through_and_its_operations_are_done(mesh):
    async with serving(mesh) as (_, head, back):
        await head.send(prompt(mesh.fence, 1, [4, 5]))
        await back.read()
        frame = FailedFrame(mesh.fence, 2, Failure(0, "no_kv_room", "full", (1,), (Close(0),)))
        await head.send(frame)
        assert await back.read() == frame
        await head.send(prompt(mesh.fence, 3, [6], start=2, opened=False))
        assert (await back.read()).failure.reason == "lane_closed"


async def refused(mesh, data, kind):
    """Send `data` behind a first good microbatch; the stage must say `kind`, close, and take new neighbours."""
    events = Events()
    async with serving(mesh, events) as (stage, head, back):
        await head.send(prompt(mesh.fence, 1, [4, 5]))
        await back.read()
        await head.tls.send_all(data)
        event = await events.next()
        assert (event.kind, event.side) == (kind, UPSTREAM)
        with pytest.raises(trio.BrokenResourceError):
            await back.read()
        to_stage, from_stage = await connect(stage, mesh)
        await to_stage.send(prompt(mesh.fence, 1, [4]))
        assert await from_stage.read() == SampledFrame(mesh.fence, 1, (LaneSample(0, 0, 5),))
        for stream in (to_stage, from_stage):
            await trio.aclose_forcefully(stream.tls)


async def test_a_replayed_frame_is_refused(mesh):
    await refused(mesh, b"".join(encode(prompt(mesh.fence, 1, [4, 5]))), "bad_frame")


async def test_a_frame_that_skips_one_is_refused(mesh):
    await refused(mesh, b"".join(encode(prompt(mesh.fence, 3, [6], start=2, opened=False))), "bad_frame")


@pytest.mark.parametrize("term", [0, 1], ids=["another run", "another term"])
async def test_a_frame_of_another_run_or_term_is_refused(mesh, term):
    fence = Fence(Term(mesh.fence.term + term), mesh.fence.run if term else OTHER_RUN)
    await refused(mesh, b"".join(encode(prompt(fence, 2, [6], start=2, opened=False))), "stale_frame")


async def test_activations_where_tokens_belong_are_refused(mesh):
    frame = prompt(mesh.fence, 2, [6], start=2, opened=False)
    rows = Rows(mesh.fence, 2, (), frame.positions, frame.lanes, frame.logits, None, np.zeros((1, 1), np.float32))
    await refused(mesh, b"".join(encode(rows)), "bad_frame")


async def test_more_rows_than_a_chunk_are_refused(mesh):
    await refused(mesh, b"".join(encode(prompt(mesh.fence, 2, [6] * 65, start=2, opened=False))), "bad_frame")


async def test_bytes_that_are_no_frame_are_refused(mesh):
    await refused(mesh, b"GET / HTTP/1.1\r\n\r\n" + bytes(HEADER_BYTES), "bad_frame")


async def test_a_sampled_frame_does_not_come_from_upstream(mesh):
    await refused(mesh, b"".join(encode(SampledFrame(mesh.fence, 2, ()))), "bad_frame")


async def test_a_truncated_frame_ends_the_streams(mesh):
    events = Events()
    async with serving(mesh, events) as (stage, head, _):
        await head.tls.send_all(b"".join(encode(prompt(mesh.fence, 1, [4, 5])))[:-1])
        await head.tls.aclose()
        assert (await events.next()).kind == "neighbour_lost"
        assert (await stage.ping()).state == "loaded"


async def test_a_silent_upstream_and_a_vanished_downstream_are_told_to_the_node(mesh):
    events = Events()
    async with serving(mesh, events, silence_ms=300):
        event = await events.next()
        assert (event.kind, event.side, event.message) == ("neighbour_lost", UPSTREAM, "the neighbour has gone silent")
    events = Events()
    async with serving(mesh, events) as (stage, _, back):
        await trio.aclose_forcefully(back.tls)
        event = await events.next()
        assert (event.kind, event.side) == ("neighbour_lost", DOWNSTREAM)
        assert (await stage.ping()).state == "loaded"


async def test_a_downstream_that_vanished_is_the_side_that_is_named_also_when_an_answer_finds_out(mesh):
    events = Events()
    async with serving(mesh, events) as (_, head, back):
        await trio.aclose_forcefully(back.tls)
        # The first answer may still go into the void, the second cannot.
        with contextlib.suppress(trio.BrokenResourceError):
            for number in range(1, 50):
                await head.send(prompt(mesh.fence, number, [4]))
        assert (await events.next()).side == DOWNSTREAM


async def test_heartbeats_keep_an_idle_stage_and_come_from_it(mesh):
    async with serving(mesh) as (_, head, back):
        await head.send(Heartbeat(mesh.fence))
        with trio.fail_after(PATIENCE_S):
            assert await back._read_one() == Heartbeat(mesh.fence, 0)
        await head.send(prompt(mesh.fence, 1, [4]))
        assert (await back.read()).microbatch == 1
        with trio.fail_after(PATIENCE_S):
            assert await back._read_one() == Heartbeat(mesh.fence, 1)


@contextlib.asynccontextmanager
async def refusing(mesh, reason):
    """A stage that waits for its upstream; connecting it must fail with `reason`."""
    async with spawned(Events(), module=TOY) as stage:
        await stage.load(whole_model(""))
        await introduce(stage, mesh)
        dialed, accepted = tcp_pair()
        with dialed:

            async def hand_over():
                with pytest.raises(StageError) as caught:
                    await stage.connect(UPSTREAM, accepted)
                assert caught.value.reason == reason

            async with trio.open_nursery() as nursery:
                nursery.start_soon(hand_over)
                yield dialed
        # The place is free again, and the right neighbour is taken.
        for stream in await connect(stage, mesh):
            await trio.aclose_forcefully(stream.tls)


async def test_a_certificate_of_another_mesh_is_refused(mesh):
    stranger = ThrowawayMesh.make()
    async with refusing(mesh, "handshake_failed") as dialed:
        # The stranger trusts this mesh, so that it is the stage that refuses.
        key = Ed25519PrivateKey.generate()
        chain = stranger.chain_for(key.public_key(), stranger.head_name)
        with contextlib.suppress(trio.BrokenResourceError):
            stream = await secured(
                dialed, mesh, "", server=False, context=stage_context(False, chain, key, mesh.root_pem)
            )
            await stream.greet(mesh.fence)


async def test_no_certificate_is_refused(mesh):
    async with refusing(mesh, "handshake_failed") as dialed:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(cadata=mesh.root_pem.decode())
        with contextlib.suppress(trio.BrokenResourceError):
            stream = await secured(dialed, mesh, "", server=False, context=context)
            await stream.greet(mesh.fence)


@pytest.mark.parametrize("who", ["a stage", "another run", "the node itself"])
async def test_a_certificate_of_this_mesh_with_another_name_is_refused(mesh, who):
    names = {
        "a stage": mesh.stage_name(1),
        "another run": head_name(OTHER_RUN, mesh.node_id),
        "the node itself": f"{mesh.node_id}.mesh",
    }
    async with refusing(mesh, "wrong_peer") as dialed:
        with contextlib.suppress(trio.BrokenResourceError):
            await (await secured(dialed, mesh, names[who], server=False)).greet(mesh.fence)


async def test_a_stage_certificate_of_another_node_is_refused(mesh):
    # Its own node signed it, under its name constraint: the chain is sound, the name is not the planned one.
    both = TestMesh()
    planned, other = both.node(), both.node()
    run = RunId("00112233445566aa")
    fence = Fence(Term(1), run)
    mine = ThrowawayMesh(planned.authority, planned.chain, planned.root_pem, fence)
    theirs = ThrowawayMesh(other.authority, other.chain, other.root_pem, fence)
    async with refusing(mine, "wrong_peer") as dialed:
        with contextlib.suppress(trio.BrokenResourceError):
            await (await secured(dialed, theirs, stage_name(0, run, NodeId(other.node_id)), server=False)).greet(fence)


async def test_streams_with_a_revoked_node_end_and_it_is_not_let_in_again(mesh):
    events = Events()
    neighbour = NodeId(mesh.head_name.split(".")[-2])
    async with serving(mesh, events) as (stage, head, back):
        await stage.bar((NodeId("a" * 52),))
        await head.send(prompt(mesh.fence, 1, [4, 5, 6]))
        assert isinstance(await back.read(), SampledFrame), "another node's end is nothing to it"
        await stage.bar((neighbour,))
        with pytest.raises(trio.BrokenResourceError):
            await back.read()
        ours, its = tcp_pair()
        with ours, pytest.raises(StageError) as refused:
            await stage.connect(UPSTREAM, its)
        assert refused.value.reason == "no_credentials"
        with pytest.raises(StageError) as refused:
            await introduce(stage, mesh)
        assert refused.value.reason == "barred"
        assert (await stage.ping()).state == "loaded"


async def test_a_greeting_of_another_run_is_refused(mesh):
    async with refusing(mesh, "stale_fence") as dialed:
        stream = await secured(dialed, mesh, mesh.head_name, server=False)
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.greet(Fence(mesh.fence.term, OTHER_RUN))


async def test_a_stream_that_begins_with_rows_instead_of_a_greeting_is_refused(mesh):
    async with refusing(mesh, "wrong_peer") as dialed:
        stream = await secured(dialed, mesh, mesh.head_name, server=False)
        await stream.send(prompt(mesh.fence, 1, [4]))


async def test_adopting_a_new_fence_closes_the_streams_and_keeps_the_cache(mesh):
    events = Events()
    async with serving(mesh, events) as (stage, head, back):
        await head.send(prompt(mesh.fence, 1, [4, 5]))
        await back.read()
        fence = Fence(Term(mesh.fence.term + 1), OTHER_RUN)
        spki = await stage.prepare()
        name = stage_name(0, OTHER_RUN, mesh.node_id)
        await stage.adopt(
            Adopt(
                chain=mesh.chain_for_spki(spki, name),
                root=mesh.root_pem,
                upstream_name=mesh.head_name,
                downstream_name=mesh.head_name,
                fence=fence,
                stage=0,
                stages=1,
            )
        )
        with pytest.raises(trio.BrokenResourceError):
            await back.read()
        to_stage, from_stage = await connect(stage, mesh, fence)
        await to_stage.send(prompt(fence, 1, [6], start=2, opened=False))
        assert await from_stage.read() == SampledFrame(fence, 1, (LaneSample(0, 2, 7),))
        for stream in (to_stage, from_stage):
            await trio.aclose_forcefully(stream.tls)


async def test_a_stage_that_another_head_adopts_starts_with_empty_lanes(mesh):
    async with serving(mesh) as (stage, head, back):
        await head.send(prompt(mesh.fence, 1, [4, 5]))
        await back.read()
        assert (await stage.stats()).cells_used == 2
        fence = Fence(Term(mesh.fence.term + 1), OTHER_RUN)
        spki = await stage.prepare()
        chain = mesh.chain_for_spki(spki, stage_name(0, OTHER_RUN, mesh.node_id))
        names = {"upstream_name": mesh.head_name, "downstream_name": mesh.head_name}
        await stage.adopt(Adopt(chain=chain, root=mesh.root_pem, **names, fence=fence, stage=0, stages=1, clear=True))
        assert (await stage.stats()).cells_used == 0


async def test_a_stage_answers_no_frame_after_its_lease_until_a_later_one_came(mesh):
    events = Events()
    async with serving(mesh, events) as (stage, head, back):
        await stage.lease(1000.0)
        await head.send(prompt(mesh.fence, 1, [4]))
        await back.read()
        await stage.lease(0.0)
        await head.send(prompt(mesh.fence, 2, [5]))
        with pytest.raises(trio.BrokenResourceError):
            await back.read()
        assert (await events.next()).kind == "stale_frame", "its streams are gone when it says so"
        await stage.lease(1000.0)
        to_stage, from_stage = await connect(stage, mesh, mesh.fence)
        await to_stage.send(prompt(mesh.fence, 1, [6]))
        assert (await from_stage.read()).samples
        for stream in (to_stage, from_stage):
            await trio.aclose_forcefully(stream.tls)


async def test_r96_a_step_beyond_its_deadline_is_aborted_and_answered(mesh):
    async with serving(mesh, step_deadline_ms=100) as (stage, head, back):
        await head.send(prompt(mesh.fence, 1, [1]))
        failed = await back.read()
        assert (failed.failure.reason, failed.failure.lanes) == ("aborted", (0,))
        await head.send(prompt(mesh.fence, 2, [4]))
        assert (await back.read()).samples[0].token == 5
        assert (await stage.stats()).cells_used == 1


async def test_r96_a_step_that_cannot_be_aborted_ends_the_process_which_says_why(mesh):
    async with serving(mesh, step_deadline_ms=100) as (stage, head, _):
        await head.send(prompt(mesh.fence, 1, [2]))
        with trio.fail_after(PATIENCE_S):
            lost = await stage.wait_lost()
        assert stage.exit_code == EXIT_STUCK
        assert "native code does not return" in str(lost)


async def test_r95_a_crash_of_native_code_in_a_step_ends_streams_and_requests_at_once(mesh):
    async with serving(mesh) as (stage, head, back):
        await head.send(prompt(mesh.fence, 1, [3]))
        with pytest.raises(trio.BrokenResourceError):
            await back.read()
        await stage.wait_lost()
        with pytest.raises(StageLost) as caught:
            await stage.ping()
        assert "SIGABRT" in str(caught.value)


async def test_r98_what_native_code_prints_is_kept_for_the_error_and_disturbs_nothing(mesh):
    async with serving(mesh) as (stage, head, back):
        await head.send(prompt(mesh.fence, 1, [4]))
        await back.read()
        os.kill(stage.pid, signal.SIGTERM)
        assert "SIGTERM" in str(await stage.wait_lost())


async def test_shutdown_during_a_step_says_bye(mesh):
    async with serving(mesh) as (stage, head, _):
        await head.send(prompt(mesh.fence, 1, [1]))
        assert await stage.shutdown() == 0


async def test_unload_during_a_step_aborts_it(mesh):
    async with serving(mesh) as (stage, head, _):
        await head.send(prompt(mesh.fence, 1, [1]))
        await stage.unload()
        assert (await stage.ping()).state == "empty"
