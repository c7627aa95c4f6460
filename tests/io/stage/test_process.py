"""A real stage process, driven by its node: requests, refusals, death and stuckness."""

import contextlib
import os
import signal
import subprocess
import sys

import msgpack
import psutil
import pytest
import trio
import trio.testing

from meshnode.app.bench.throwaway import ThrowawayMesh
from meshnode.errors import StageError, StageLost
from meshnode.io.stage.process import StageProcess
from meshnode.wire.stage_protocol import DOWNSTREAM, UPSTREAM, Connect, Connected, Ping, Pong
from tests.factory import build
from tests.io.stage.neighbour import PATIENCE_S, Events, introduce, spawned, tcp_pair, whole_model

pytestmark = [pytest.mark.native]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build(tmp_path_factory.mktemp("model") / "tiny.gguf", layers=2)


@pytest.fixture
def pair():
    """Makes loopback connections; what the test keeps of them is closed behind it."""
    with contextlib.ExitStack() as stack:

        def make():
            dialed, accepted = tcp_pair()
            stack.enter_context(dialed)
            return dialed, accepted

        yield make


async def test_r88_a_ping_tells_who_it_is_before_and_after_the_load(model):
    async with spawned(Events()) as stage:
        empty = await stage.ping()
        assert (empty.state, empty.build, empty.fingerprint) == ("empty", "llama-cpp-python 0.3.36", "")
        fractions = []
        loaded = await stage.load(whole_model(model, manifest_digest="abc"), fractions.append)
        assert (loaded.width, loaded.vocabulary, loaded.trim_any) == (64, 512, True)
        assert fractions == sorted(fractions)
        pong = await stage.ping()
        assert (pong.state, pong.stage, pong.stages, pong.first, pong.last) == ("loaded", 0, 1, 0, 2)
        assert (pong.fingerprint, pong.manifest_digest) == (loaded.fingerprint, "abc")
        assert await stage.shutdown() == 0


async def test_a_ping_is_answered_during_a_load_and_a_file_that_ends_too_early_is_refused(tmp_path):
    fifo = tmp_path / "slow.gguf"
    os.mkfifo(fifo)
    async with spawned(Events()) as stage, trio.open_nursery() as nursery:
        refused = []

        async def load():
            with pytest.raises(StageError) as caught:
                await stage.load(whole_model(fifo))
            refused.append(caught.value.reason)

        nursery.start_soon(load)
        while (await stage.ping()).state != "loading":
            pass
        with pytest.raises(StageError) as caught:
            await stage.load(whole_model(fifo))
        assert caught.value.reason == "already_loaded"
        # The engine may open the file more than once: every reader gets its end.
        while not refused:
            try:
                os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:
                await trio.lowlevel.checkpoint()
        assert refused == ["model"]


async def test_a_corrupt_slice_is_refused_and_the_process_takes_the_next_one(model, tmp_path):
    data = bytearray(model.read_bytes())
    async with spawned(Events()) as stage:
        for offset, value in ((0, b"GGUX"), (8, b"\xff" * 8), (24, b"\xff" * 8)):
            broken = tmp_path / f"{offset}.gguf"
            broken.write_bytes(data[:offset] + value + data[offset + len(value) :])
            with pytest.raises(StageError) as caught:
                await stage.load(whole_model(broken))
            assert caught.value.reason in {"model", "load_failed"}
        (tmp_path / "half.gguf").write_bytes(data[: len(data) // 2])
        with pytest.raises(StageError):
            await stage.load(whole_model(tmp_path / "half.gguf"))
        with pytest.raises(StageError):
            await stage.load(whole_model(tmp_path / "absent.gguf"))
        assert (await stage.load(whole_model(model))).width == 64


@pytest.mark.parametrize(
    "changes", [{"stage": 1}, {"first": 2}, {"last": 3}, {"threads": 0}, {"silence_ms": 0}], ids=lambda c: next(iter(c))
)
async def test_an_impossible_place_is_refused_before_anything_is_read(model, changes):
    async with spawned(Events()) as stage:
        with pytest.raises(StageError) as caught:
            await stage.load(whole_model(model, **changes))
        assert caught.value.reason == "malformed"


async def test_a_cancelled_load_ends_typed_and_another_can_follow(model):
    async with spawned(Events()) as stage, trio.open_nursery() as nursery:

        async def load():
            with pytest.raises(StageError) as caught:
                await stage.load(whole_model(model))
            assert caught.value.reason == "cancelled"

        # The first load imports the native library, which takes long enough for the cancel behind it to be read.
        nursery.start_soon(load)
        while (await stage.ping()).state != "loading":
            pass
        await stage.cancel()
    async with spawned(Events()) as stage:
        await stage.load(whole_model(model))


async def test_r85_an_unknown_op_and_a_malformed_field_are_answered_and_the_connection_stays_usable():
    async with spawned(Events()) as stage:
        answers = []
        stage._dispatch, dispatch = answers.append, stage._dispatch
        for number, body in ((901, {"op": "dance"}), (902, {"op": "load", "what": 5}), (903, {})):
            data = msgpack.packb({"id": number, **body})
            stage._outgoing.send_nowait((len(data).to_bytes(4) + data, None))
        while len(answers) < 3:
            await trio.lowlevel.checkpoint()
        assert [(answer.id, answer.kind) for answer in answers] == [
            (901, "unknown_op"),
            (902, "malformed"),
            (903, "unknown_op"),
        ]
        stage._dispatch = dispatch
        assert isinstance(await stage._request(Ping(id=stage._next_id()), Pong), Pong)


async def test_r93_after_an_unload_everything_that_needs_a_model_is_refused_typed(model, pair):
    async with spawned(Events()) as stage:
        for _ in range(2):
            await stage.load(whole_model(model))
            assert (await stage.stats()).rows == 0
            await stage.unload()
            for request in (stage.stats, stage.unload, lambda: stage.connect(UPSTREAM, pair()[1])):
                with pytest.raises(StageError) as caught:
                    await request()
                assert caught.value.reason == "not_loaded"


async def test_a_killed_process_ends_every_request_as_lost_with_the_signal_named(model):
    async with spawned(Events()) as stage, trio.open_nursery() as nursery:
        await stage.load(whole_model(model))
        os.kill(stage.pid, signal.SIGSTOP)
        lost = []

        async def ask():
            with pytest.raises(StageLost) as caught:
                await stage.stats()
            lost.append(str(caught.value))

        for _ in range(3):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        os.kill(stage.pid, signal.SIGKILL)
        with trio.fail_after(PATIENCE_S):
            assert "SIGKILL" in str(await stage.wait_lost())
        with pytest.raises(StageLost):
            await stage.ping()
    assert len(lost) == 3


async def test_a_stopped_process_is_bounded_by_deadlines_and_killed():
    async with spawned(Events()) as stage:
        await stage.ping()
        os.kill(stage.pid, signal.SIGSTOP)
        with pytest.raises(StageError) as caught:
            await stage.ping(timeout_s=0.05)
        assert caught.value.reason == "no_answer"
        assert await stage.shutdown(grace_s=0.05) == -signal.SIGKILL


async def test_leaving_the_context_or_its_nursery_reaps_the_child_and_closes_every_descriptor():
    async with spawned(Events()):
        pass
    before = len(os.listdir("/proc/self/fd"))
    async with trio.open_nursery() as nursery:
        stage = await StageProcess.spawn(nursery, "stage 0", threads=1, on_event=Events())
        await stage.ping()
        nursery.cancel_scope.cancel()
    assert stage.exit_code == -signal.SIGKILL
    assert not psutil.pid_exists(stage.pid)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_neighbours_cannot_be_connected_before_credentials_or_without_a_descriptor(model, pair):
    async with spawned(Events()) as stage:
        await stage.load(whole_model(model))
        with pytest.raises(StageError) as caught:
            await stage.connect(UPSTREAM, pair()[1])
        assert caught.value.reason == "no_credentials"
        with pytest.raises(StageError) as caught:
            await stage._request(Connect(id=stage._next_id(), side=DOWNSTREAM), Connected)
        assert caught.value.reason == "no_descriptor"


async def test_at_most_two_connections_wait_for_their_handshake(model, pair):
    async with spawned(Events()) as stage:
        await stage.load(whole_model(model))
        await introduce(stage, ThrowawayMesh.make())
        waiting = [pair(), pair()]

        async def connect(accepted):
            with pytest.raises(StageError) as caught:
                await stage.connect(UPSTREAM, accepted)
            assert caught.value.reason == "handshake_failed"

        async with trio.open_nursery() as nursery:
            for _, accepted in waiting:
                nursery.start_soon(connect, accepted)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(StageError) as caught:
                await stage.connect(DOWNSTREAM, pair()[1])
            assert caught.value.reason == "too_many_handshakes"
            for dialed, _ in waiting:
                dialed.close()


def test_r94_when_its_node_dies_the_stage_ends():
    script = (
        "import sys, trio, os, signal\n"
        "from meshnode.io.stage.process import StageProcess\n"
        "async def main():\n"
        "    async with trio.open_nursery() as nursery:\n"
        "        stage = await StageProcess.spawn(nursery, 's', threads=1, on_event=print)\n"
        "        await stage.ping()\n"
        "        print(stage.pid, flush=True)\n"
        "        await trio.to_thread.run_sync(sys.stdin.read)\n"
        "trio.run(main)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    ) as node:
        stage = psutil.Process(int(node.stdout.readline()))
        node.send_signal(signal.SIGKILL)
        stage.wait(timeout=PATIENCE_S)
    assert not stage.is_running()
