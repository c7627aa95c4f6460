"""The two ends of a BULK stream, in memory and over real TLS through the transport."""

from contextlib import asynccontextmanager

import pytest
import trio

from meshnode.errors import LinkLost, PeerError
from meshnode.io.artifacts import ArtifactStore, BulkClient, Library, bulk, serve_bulk
from meshnode.io.transport.transport import Handlers, Transport
from meshnode.wire.artifacts import Chunk, Sending, encode
from meshnode.wire.preface import StreamClass
from tests.identity.mesh import TestMesh
from tests.io.artifacts.rig import LAYERS, Model, PlainLayouts, expected, memory_pair


@asynccontextmanager
async def in_memory(library):
    here, there = memory_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_bulk, there, library)
        yield here
        await here.aclose()


@asynccontextmanager
async def over_tls(library):
    mesh = TestMesh()
    holder = mesh.node()

    async def member(stream):
        await serve_bulk(stream, library)

    async with trio.open_nursery() as nursery:
        port = await nursery.start(Transport(holder).serve, "127.0.0.1", 0, Handlers(member))
        stream = await Transport(mesh.node()).dial(holder.node_id, [f"127.0.0.1:{port}"], StreamClass.BULK)
        yield stream
        await stream.aclose()
        nursery.cancel_scope.cancel()


@pytest.fixture(scope="module")
def model():
    return Model(layer_bytes=2_500_000)


def library_of(model, cache=None):
    library = Library(cache)
    library.add(model.source())
    return library


@pytest.mark.parametrize("connected", [in_memory, over_tls])
async def test_a_joiner_without_the_file_gets_every_slice_right(model, tmp_path, connected):
    store = ArtifactStore(tmp_path / "artifacts", PlainLayouts())
    async with connected(library_of(model)) as stream:
        client = BulkClient(stream, "holder")
        for first, last in ((0, 2), (2, 5), (5, LAYERS)):
            ready = await store.prepare(model.digest, first, last, [client])
            layout = PlainLayouts().slice(ready.metadata, model.manifest, first, last)
            assert ready.path.read_bytes() == expected(model, layout)
            assert ready.fetched_bytes + ready.copied_bytes >= layout.size - 4096


@pytest.mark.parametrize("connected", [in_memory, over_tls])
async def test_the_stream_lives_on_after_a_refusal(model, connected):
    async def drop(data):
        pass

    async with connected(library_of(model)) as stream:
        client = BulkClient(stream, "holder")
        with pytest.raises(PeerError, match=r"holder does not give layer\.99: no_artifact"):
            await client.fetch(model.digest, "layer.99", 0, 10, drop)
        with pytest.raises(PeerError, match="bad_range"):
            await client.fetch(model.digest, "layer.1", 2_499_999, 3, drop)
        with pytest.raises(PeerError, match="the manifest: no_manifest"):
            await client.manifest("0" * 64)
        assert await client.manifest(model.digest) == model.source().manifest_bytes


@pytest.mark.parametrize("connected", [in_memory, over_tls])
async def test_the_way_is_measured_with_bytes_that_nobody_keeps(model, connected):
    async with connected(library_of(model)) as stream:
        client = BulkClient(stream, "holder")
        await client.sample(1)
        await client.sample(3 * 1024 * 1024 + 1)
        assert await client.manifest(model.digest) == model.source().manifest_bytes


async def test_an_unknown_request_is_refused_and_the_stream_lives_on(model):
    import msgspec

    async with in_memory(library_of(model)) as stream:
        await stream.send_frame(msgspec.msgpack.encode({"op": "sing"}))
        assert msgspec.msgpack.decode(await stream.receive_frame()) == {"op": "refused", "reason": "unknown_op"}
        assert await BulkClient(stream, "holder").manifest(model.digest)


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x81\xa2op\xaeget_manifest", b"\xff" * 100])
async def test_what_is_no_request_ends_the_stream(model, frame):
    here, there = memory_pair()
    await here.send_frame(frame)
    with pytest.raises(PeerError):
        await serve_bulk(there, library_of(model))


async def test_a_file_that_breaks_under_the_holder_is_a_refusal_in_the_middle(model):
    def read(artifact, offset, length):
        if offset > 1_500_000:
            raise OSError("gone")
        return model.read(artifact, offset, length)

    source = model.source()
    source._read = read
    library = Library()
    library.add(source)
    got = []

    async def keep(data):
        got.append(data)

    async with in_memory(library) as stream:
        client = BulkClient(stream, "holder")
        with pytest.raises(PeerError, match="unreadable"):
            await client.fetch(model.digest, "layer.0", 0, 2_500_000, keep)
        assert b"".join(got) == model.data["layer.0"][: 2 << 20]
        assert await client.manifest(model.digest)


async def test_a_node_passes_on_what_it_has_cached_itself(model, tmp_path):
    middle = ArtifactStore(tmp_path / "middle", PlainLayouts())
    await middle.prepare(model.digest, 1, 4, [model.source()])
    last = ArtifactStore(tmp_path / "last", PlainLayouts())
    async with in_memory(Library(middle)) as stream:
        ready = await last.prepare(model.digest, 2, 4, [BulkClient(stream, "middle")])
    assert ready.path.read_bytes() == expected(model, PlainLayouts().slice(ready.metadata, model.manifest, 2, 4))


LIES = {
    "more than announced": [Sending(10), Chunk(11)],
    "another size": [Sending(9)],
    "a chunk first": [Chunk(5)],
    "two announcements": [Sending(10), Sending(10)],
}


@pytest.mark.parametrize("answers", LIES.values(), ids=LIES)
async def test_a_peer_that_breaks_the_protocol_is_found(model, answers):
    async def drop(data):
        pass

    here, there = memory_pair()
    for answer in answers:
        await there.send_frame(encode(answer))
    with pytest.raises(PeerError):
        await BulkClient(here, "liar").fetch(model.digest, "layer.0", 0, 10, drop)


async def test_a_manifest_without_end_is_refused_before_it_is_read(model):
    here, there = memory_pair()
    await there.send_frame(encode(Sending(1 << 40)))
    with pytest.raises(PeerError, match="manifest of 1099511627776 bytes"):
        await BulkClient(here, "liar").manifest(model.digest)


async def test_a_peer_that_sends_nothing_is_given_up(model, autojump_clock):
    here, _there = memory_pair()
    before = trio.current_time()
    with pytest.raises(LinkLost, match="holder sent nothing for 30 s"):
        await BulkClient(here, "holder").manifest(model.digest)
    assert trio.current_time() - before == bulk.STALL_S


async def test_an_idle_stream_and_one_that_is_not_read_are_let_go(model, autojump_clock):
    _here, there = memory_pair()
    await serve_bulk(there, library_of(model))
    assert trio.current_time() >= bulk.IDLE_S
