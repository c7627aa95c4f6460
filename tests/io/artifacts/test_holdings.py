import os
from collections import namedtuple

import pytest

from meshnode.errors import ConfigError, PeerError
from meshnode.io.artifacts import ArtifactStore, store
from meshnode.io.artifacts.records import record_path
from meshnode.wire.manifest import Artifact, Manifest
from tests.io.artifacts.rig import Model, PlainLayouts
from tests.io.artifacts.test_store import Peer

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def model():
    return Model(layer_bytes=100_000)


def slices(cache, model):
    return sorted(path.name for path in cache.directory(model.digest).glob("slice*.gguf"))


def age(cache, model, first, last, seconds):
    """Let a slice look as if it was used so long after the epoch."""
    os.utime(record_path(cache.slice_path(model.digest, first, last)), (seconds, seconds))


async def test_the_longest_unused_slices_of_a_model_go_when_more_than_three_are_there(model, tmp_path):
    cache = ArtifactStore(tmp_path, PlainLayouts())
    for index in range(3):
        ready = await cache.prepare(model.digest, index, index + 1, [Peer(model)])
        cache.release(ready.path, ready.embedding)
        age(cache, model, index, index + 1, 1000 - index)
    await cache.prepare(model.digest, 3, 4, [Peer(model)])
    assert slices(cache, model) == ["slice-0-1.gguf", "slice-1-2.gguf", "slice-3-4.gguf"]
    assert not record_path(cache.slice_path(model.digest, 2, 3)).exists()


async def test_slices_that_are_used_do_not_go_however_many_they_are(model, tmp_path):
    """One may be on the disk for a run that waits for room, and is loaded when there is."""
    cache = ArtifactStore(tmp_path, PlainLayouts())
    for index in range(5):
        await cache.prepare(model.digest, index, index + 1, [Peer(model)])
    assert len(slices(cache, model)) == 5


async def test_using_a_slice_again_makes_it_the_youngest(model, tmp_path):
    cache = ArtifactStore(tmp_path, PlainLayouts())
    for index in range(3):
        ready = await cache.prepare(model.digest, index, index + 1, [Peer(model)])
        cache.release(ready.path, ready.embedding)
        age(cache, model, index, index + 1, 1000 + index)
    await cache.prepare(model.digest, 0, 1, [])
    await cache.prepare(model.digest, 3, 4, [Peer(model)])
    assert slices(cache, model) == ["slice-0-1.gguf", "slice-2-3.gguf", "slice-3-4.gguf"]


async def test_a_full_disk_first_gives_up_what_this_process_never_used(model, tmp_path, monkeypatch):
    other = Model(layer_bytes=100_000, seed=7)
    before = ArtifactStore(tmp_path, PlainLayouts())
    await before.prepare(other.digest, 0, 3, [Peer(other)])
    await before.prepare(model.digest, 0, 1, [Peer(model)])

    def usage(path):
        held = sum(file.stat().st_size for file in tmp_path.rglob("*.gguf"))
        return Usage(0, 0, store.SPARE_BYTES + 900_000 - held)

    cache = ArtifactStore(tmp_path, PlainLayouts())
    await cache.prepare(model.digest, 0, 1, [])
    monkeypatch.setattr("shutil.disk_usage", usage)
    await cache.prepare(model.digest, 3, 5, [Peer(model)])
    assert slices(cache, model) == ["slice-0-1.gguf", "slice-3-5.gguf"]
    assert slices(cache, other) == []
    with pytest.raises(ConfigError, match="disk"):
        await cache.prepare(other.digest, 0, 6, [Peer(other)])


async def test_only_what_somebody_uses_is_kept_from_making_room(model, tmp_path, monkeypatch):
    """Two stages may load one file; a node that serves other models by now must not be full of the first for ever."""
    cache = ArtifactStore(tmp_path, PlainLayouts())
    usage = namedtuple("usage", "total used free")
    first = [await cache.prepare(model.digest, 0, 1, [Peer(model)]) for _ in range(2)]
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 0, 0))
    for ready in first:
        with pytest.raises(ConfigError, match="disk"):
            await cache.prepare(model.digest, 3, 5, [Peer(model)])
        assert ready.path.exists()
        cache.release(ready.path, ready.embedding)
    with pytest.raises(ConfigError, match="disk"):
        await cache.prepare(model.digest, 3, 5, [Peer(model)])
    assert not ready.path.exists()
    assert not cache._users, "what failed uses nothing either"
    cache.release(ready.path, None)
    assert not cache._users


async def test_a_part_that_nobody_wants_any_more_goes_too(model, tmp_path, monkeypatch):
    cache = ArtifactStore(tmp_path, PlainLayouts())
    await cache.prepare(model.digest, 0, 1, [Peer(model)])
    part = cache.slice_path(model.digest, 2, 5).with_name("slice-2-5.gguf.part")
    journal = part.with_name("slice-2-5.gguf.journal")
    part.write_bytes(bytes(1000))
    journal.write_text("layout 0\n")
    cache.make_room(1, frozenset({cache.slice_path(model.digest, 0, 1)}), lambda: 0)
    assert not part.exists()
    assert not journal.exists()
    assert slices(cache, model) == ["slice-0-1.gguf"]


async def test_metadata_without_end_is_refused_before_it_is_read(tmp_path):
    model = Model(layer_bytes=1000)
    huge = [Artifact("metadata", 1 << 40, bytes(32)), *model.manifest.artifacts[1:]]
    model.manifest = Manifest(1, "llama", model.manifest.layers, tuple(huge))
    digest = model.source().digest
    peer = Peer(model)
    with pytest.raises(PeerError, match="of metadata"):
        await ArtifactStore(tmp_path, PlainLayouts()).prepare(digest, 0, 1, [peer])
    assert peer.sent == 0


async def test_damaged_metadata_and_manifest_are_fetched_again(model, tmp_path):
    cache = ArtifactStore(tmp_path, PlainLayouts())
    ready = await cache.prepare(model.digest, 0, 1, [Peer(model)])
    ready.metadata.write_bytes(b"GGUF")
    (ready.path.parent / "manifest.msgpack").write_bytes(b"\xc1")
    assert cache.manifest_bytes(model.digest) is None
    peer = Peer(model)
    again = await cache.prepare(model.digest, 0, 1, [peer])
    assert peer.sent == len(model.data["metadata"])
    assert again.metadata.read_bytes() == model.data["metadata"]
    assert again.fetched_bytes == 0
