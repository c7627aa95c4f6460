import errno
import os
from collections import namedtuple

import pytest
import trio

from meshnode.errors import ConfigError, LinkLost, PeerError
from meshnode.io.artifacts import ArtifactStore, part
from tests.io.artifacts.rig import LAYERS, Model, PlainLayouts, expected


class Peer:
    """A source over the network, which can lie, refuse or go away."""

    remote = True

    def __init__(self, model, label="peer", lies=(), dies_after=None, piece=100_000):
        self.model, self.label, self.lies, self.dies_after, self.piece = model, label, list(lies), dies_after, piece
        self.sent = 0

    async def manifest(self, digest):
        return await self.model.source().manifest(digest)

    async def fetch(self, digest, artifact, offset, length, sink):
        flip = artifact in self.lies
        if flip:
            self.lies.remove(artifact)
        for at in range(offset, offset + length, self.piece):
            data = self.model.read(artifact, at, min(self.piece, offset + length - at))
            if flip:
                data, flip = bytes([data[0] ^ 1]) + data[1:], False
            if self.dies_after is not None and self.sent + len(data) > self.dies_after:
                raise LinkLost(f"{self.label} went away")
            self.sent += len(data)
            await sink(data)


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "artifacts", PlainLayouts())


def weights(model, first, last):
    names = ["shared", *(f"layer.{index}" for index in range(first, last))]
    names += ["embedding"] * (first == 0 and last < LAYERS) + ["output"] * (last == LAYERS)
    return sum(len(model.data[name]) for name in names)


async def test_a_slice_is_what_its_layout_says(model, store):
    ready = await store.prepare(model.digest, 1, 4, [Peer(model)])
    layout = PlainLayouts().slice(ready.metadata, model.manifest, 1, 4)
    assert ready.path.read_bytes() == expected(model, layout)
    assert (ready.fetched_bytes, ready.copied_bytes, ready.embedding) == (weights(model, 1, 4), 0, None)
    assert sorted(path.name for path in ready.path.parent.iterdir()) == [
        "manifest.msgpack",
        "metadata.gguf",
        "slice-1-4.gguf",
        "slice-1-4.gguf.record",
    ]


async def test_the_first_slice_of_a_split_comes_with_the_embedding_and_a_whole_model_without(model, store):
    ready = await store.prepare(model.digest, 0, 2, [model.source()])
    layout = PlainLayouts().embedding(ready.metadata, model.manifest)
    assert ready.embedding.read_bytes() == expected(model, layout)
    assert ready.fetched_bytes == 0
    assert (await store.prepare(model.digest, 0, LAYERS, [model.source()])).embedding is None


async def test_a_second_start_moves_no_byte_and_asks_nobody(model, store, tmp_path):
    await store.prepare(model.digest, 0, 3, [Peer(model)])
    silent = Peer(model, dies_after=0)
    again = await ArtifactStore(tmp_path / "artifacts", PlainLayouts()).prepare(model.digest, 0, 3, [silent])
    assert (again.fetched_bytes, again.copied_bytes, silent.sent) == (0, 0, 0)


async def test_layers_of_another_slice_are_copied_and_only_the_rest_is_fetched(model, store):
    await store.prepare(model.digest, 0, 3, [Peer(model)])
    ready = await store.prepare(model.digest, 1, 5, [Peer(model)])
    assert ready.fetched_bytes == weights(model, 3, 5) - len(model.data["shared"])
    assert ready.copied_bytes == weights(model, 1, 3)
    layout = PlainLayouts().slice(ready.metadata, model.manifest, 1, 5)
    assert ready.path.read_bytes() == expected(model, layout)


async def test_a_cut_transfer_goes_on_inside_the_artifact_where_it_was(model, store, tmp_path, monkeypatch):
    monkeypatch.setattr(part, "MARK_BYTES", 1_000_000)
    whole = weights(model, 1, 4)
    with pytest.raises(LinkLost):
        await store.prepare(model.digest, 1, 4, [Peer(model, dies_after=8_700_000)])
    later = Peer(model)
    ready = await ArtifactStore(tmp_path / "artifacts", PlainLayouts()).prepare(model.digest, 1, 4, [later])
    # 4000 of metadata came first; one mark and one piece is the most that is fetched twice.
    assert whole - 8_700_000 <= ready.fetched_bytes <= whole - 8_700_000 + 1_200_000
    layout = PlainLayouts().slice(ready.metadata, model.manifest, 1, 4)
    assert ready.path.read_bytes() == expected(model, layout)


async def test_layers_of_a_slice_that_was_never_finished_serve_another_plan(model, store):
    with pytest.raises(LinkLost):
        await store.prepare(model.digest, 1, 4, [Peer(model, dies_after=12_000_000)])
    ready = await store.prepare(model.digest, 2, 5, [Peer(model)])
    layout = PlainLayouts().slice(ready.metadata, model.manifest, 2, 5)
    assert ready.path.read_bytes() == expected(model, layout)
    assert ready.fetched_bytes == len(model.data["layer.3"]) + len(model.data["layer.4"])
    assert ready.copied_bytes == len(model.data["layer.2"]) + len(model.data["shared"])


async def test_a_resumed_prefix_that_lies_is_found_and_fetched_again(model, store, monkeypatch):
    monkeypatch.setattr(part, "MARK_BYTES", 1_000_000)
    with pytest.raises(LinkLost):
        await store.prepare(model.digest, 1, 2, [Peer(model, dies_after=3_000_000)])
    path = store.slice_path(model.digest, 1, 2).with_name("slice-1-2.gguf.part")
    with path.open("r+b") as file:
        file.seek(500_000)
        file.write(b"damage")
    ready = await store.prepare(model.digest, 1, 2, [Peer(model)])
    layout = PlainLayouts().slice(ready.metadata, model.manifest, 1, 2)
    assert ready.path.read_bytes() == expected(model, layout)


async def test_r73_one_flipped_bit_is_fetched_again_and_two_are_an_error_that_names_artifact_and_node(model, store):
    once = await store.prepare(model.digest, 1, 3, [Peer(model, lies=["layer.2"])])
    assert once.fetched_bytes == weights(model, 1, 3) + len(model.data["layer.2"])
    with pytest.raises(PeerError, match=r"layer\.4 from liar"):
        await store.prepare(model.digest, 3, 5, [Peer(model, "liar", lies=["layer.4", "layer.4"])])
    assert not store.slice_path(model.digest, 3, 5).exists()
    # layer.3 was right and is kept; another source heals the rest
    ready = await store.prepare(model.digest, 3, 5, [Peer(model)])
    assert ready.fetched_bytes == len(model.data["layer.4"])


async def test_the_next_source_takes_over_when_one_goes_away_or_lies(model, store):
    sources = [Peer(model, "dying", dies_after=7_000_000), Peer(model, "liar", lies=["layer.2"] * 2), Peer(model)]
    ready = await store.prepare(model.digest, 1, 3, sources)
    layout = PlainLayouts().slice(ready.metadata, model.manifest, 1, 3)
    assert ready.path.read_bytes() == expected(model, layout)


async def test_r73_a_truncated_or_touched_file_is_not_used_but_mended(model, store):
    ready = await store.prepare(model.digest, 1, 4, [Peer(model)])
    content = ready.path.read_bytes()
    with ready.path.open("r+b") as file:
        file.truncate(len(content) - 3_000_000)
    assert store.cached() == {}
    mended = await store.prepare(model.digest, 1, 4, [Peer(model)])
    assert mended.path.read_bytes() == content
    assert mended.fetched_bytes == len(model.data["layer.3"])
    with ready.path.open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    os.utime(ready.path, ns=(1, 1))
    assert (await store.prepare(model.digest, 1, 4, [Peer(model)])).path.read_bytes() == content


async def test_a_layout_of_another_version_is_built_anew_from_what_is_there(model, store, tmp_path):
    await store.prepare(model.digest, 1, 4, [Peer(model)])
    other = ArtifactStore(tmp_path / "artifacts", PlainLayouts(b"v2"))
    ready = await other.prepare(model.digest, 1, 4, [])
    assert ready.path.read_bytes().startswith(b"v2 ")
    assert (ready.fetched_bytes, ready.copied_bytes) == (0, weights(model, 1, 4))


@pytest.mark.parametrize(
    "journal", ["", "layout 00\n", "done layer.1", "layout \x00\xff\ndone ../../x\n", "at x -1\n" * 9]
)
async def test_any_journal_is_survived(model, store, journal):
    path = store.slice_path(model.digest, 1, 2)
    path.parent.mkdir(parents=True)
    path.with_name(path.name + ".journal").write_bytes(journal.encode("latin-1"))
    path.with_name(path.name + ".part").write_bytes(b"rest")
    path.with_name(path.name + ".record").write_bytes(b"\xc1")
    ready = await store.prepare(model.digest, 1, 2, [Peer(model)])
    layout = PlainLayouts().slice(ready.metadata, model.manifest, 1, 2)
    assert ready.path.read_bytes() == expected(model, layout)


async def test_a_header_that_a_power_cut_took_is_written_again(model, store):
    """The size of a file can be on disk before its first page; the journal, which is small, is."""
    with pytest.raises(LinkLost):
        await store.prepare(model.digest, 1, 4, [Peer(model, dies_after=6_000_000)])
    path = store.slice_path(model.digest, 1, 4)
    with path.with_name(path.name + ".part").open("r+b") as file:
        file.write(bytes(64))
    ready = await store.prepare(model.digest, 1, 4, [Peer(model)])
    layout = PlainLayouts().slice(ready.metadata, model.manifest, 1, 4)
    assert ready.path.read_bytes() == expected(model, layout)


async def test_progress_never_passes_the_total_and_ends_at_it(model, store):
    seen = []
    await store.prepare(model.digest, 0, 2, [Peer(model)], lambda done, total: seen.append((done, total)))
    total = weights(model, 0, 2)
    assert {total for _, total in seen} == {total}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert (seen[0][0], seen[-1][0]) == (0, total)


async def test_cancelling_stops_at_once_and_keeps_what_was_fetched(model, store):
    with trio.CancelScope() as scope:

        def stop(done, total):
            if done > 6_000_000:
                scope.cancel()

        await store.prepare(model.digest, 1, 4, [Peer(model)], stop)
    assert scope.cancelled_caught
    ready = await store.prepare(model.digest, 1, 4, [Peer(model)])
    assert ready.fetched_bytes <= weights(model, 2, 4) - len(model.data["shared"])


async def test_two_preparations_of_one_slice_fetch_it_once(model, store):
    peer = Peer(model)
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(store.prepare, model.digest, 1, 3, [peer])
    assert peer.sent == weights(model, 1, 3) + len(model.data["metadata"])


async def test_nothing_is_remembered_of_manifests_that_nobody_has(model, store):
    for number in range(3):
        with pytest.raises(PeerError):
            await store.prepare(f"{number:064x}", 0, 1, [Peer(model)])
    with pytest.raises(PeerError, match="not the digest"):
        await store.prepare("x" * 60_000, 0, 1, [Peer(model)])
    assert not store._locks


async def test_a_full_disk_is_one_clear_error_before_anything_is_fetched(model, store, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 0, 65_000_000))
    peer = Peer(model)
    with pytest.raises(ConfigError, match=r"disk .* is full: 0\.01 GB more") as raised:
        await store.prepare(model.digest, 1, 4, [peer])
    assert "--data" in raised.value.hint
    assert peer.sent == len(model.data["metadata"])


async def test_a_disk_that_fills_up_on_the_way_is_the_same_error_and_the_rest_is_resumed(model, store, monkeypatch):
    written, whole = [], part.PartFile.write_at

    def write_at(self, position, data):
        written.append(len(data))
        if sum(written) > 7_000_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, position, data)

    with monkeypatch.context() as patch:
        patch.setattr(part.PartFile, "write_at", write_at)
        with pytest.raises(ConfigError, match="disk"):
            await store.prepare(model.digest, 1, 4, [Peer(model)])
    ready = await store.prepare(model.digest, 1, 4, [Peer(model)])
    assert ready.fetched_bytes <= weights(model, 2, 4)


async def test_the_cache_tells_what_it_holds_and_gives_it_to_others(model, store):
    assert store.cached() == {}
    await store.prepare(model.digest, 0, 2, [Peer(model)])
    assert store.cached() == {model.digest: ("embedding", "layer.0", "layer.1", "shared")}
    for name in ("embedding", "layer.1", "metadata"):
        size, read = store.find(model.digest, name)
        assert (size, read(10, size - 10)) == (len(model.data[name]), model.data[name][10:])
    assert store.find(model.digest, "layer.2") is None
    assert store.find("0" * 64, "layer.1") is None


@pytest.mark.parametrize("digest", ["", "..", "../" * 21 + "x", "A" * 64, "a" * 63 + "/", "a" * 64 + "\n"])
def test_what_is_no_digest_never_becomes_a_path(store, digest):
    with pytest.raises(PeerError):
        store.find(digest, "layer.0")


async def test_a_manifest_of_another_model_is_refused(model, store):
    class Liar(Peer):
        async def manifest(self, digest):
            return Model(layer_bytes=100, seed=2).source().manifest_bytes

    with pytest.raises(PeerError, match="digest differs"):
        await store.prepare(model.digest, 0, 2, [Liar(model)])
