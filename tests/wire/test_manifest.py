"""The manifest: canonical bytes, one digest, and nothing impossible accepted from a peer."""

import hashlib
import random

import msgpack
import msgspec
import pytest

from meshnode.errors import PeerError
from meshnode.wire.manifest import (
    Artifact,
    Manifest,
    TensorEntry,
    artifact_names,
    decode_manifest,
    encode_manifest,
    layer_name,
    manifest_digest,
)

ROUNDS = 10_000


def artifact(name, *sizes):
    tensors, end = [], 0
    for index, size in enumerate(sizes):
        tensors.append(TensorEntry(f"{name}.{index}", 0, (size // 4,), end, size))
        end += size
    return Artifact(name, end or 8, bytes(32), tuple(tensors))


def manifest(layers=2, **changes):
    artifacts = [artifact("metadata"), artifact("embedding", 64), artifact("output", 4, 8)]
    artifacts += [artifact(layer_name(index), 16, 32) for index in range(layers)]
    return msgspec.structs.replace(Manifest(1, "llama", layers, tuple(artifacts)), **changes)


def with_artifact(name, **changes):
    whole = manifest()
    changed = [msgspec.structs.replace(item, **changes) if item.name == name else item for item in whole.artifacts]
    return msgspec.structs.replace(whole, artifacts=tuple(changed))


def test_a_manifest_survives_the_wire_and_keeps_its_digest():
    whole = manifest()
    data = encode_manifest(whole)
    assert decode_manifest(data, manifest_digest(whole)) == whole
    assert whole.bytes_total == 8 + 64 + 12 + 2 * 48
    assert whole.artifact("layer.1").size == 48
    assert whole.artifact("shared") is None


def test_any_change_changes_the_digest():
    digests = {manifest_digest(item) for item in (manifest(), manifest(3), with_artifact("output", sha256=b"x" * 32))}
    assert len(digests) == 3


def test_a_manifest_with_another_digest_is_refused_before_it_is_decoded():
    with pytest.raises(PeerError, match="digest"):
        decode_manifest(b"no message at all", manifest_digest(manifest()))


def test_bytes_that_say_the_same_in_another_way_are_refused():
    whole = manifest()
    data = msgspec.msgpack.encode({**msgspec.to_builtins(whole, builtin_types=(bytes,)), "more": 1})
    with pytest.raises(PeerError, match="canonical"):
        decode_manifest(data)


@pytest.mark.parametrize(
    "bad",
    [
        manifest(version=2),
        manifest(layers=0),
        manifest(layers=513),
        manifest(artifacts=manifest().artifacts[1:]),
        manifest(artifacts=manifest().artifacts[:-1]),
        manifest(artifacts=manifest().artifacts[::-1]),
        manifest(artifacts=(*manifest().artifacts, artifact("layer.2", 4))),
        manifest(artifacts=(*manifest().artifacts, manifest().artifacts[-1])),
        with_artifact("embedding", size=0),
        with_artifact("embedding", size=1 << 60),
        with_artifact("embedding", size=63),
        with_artifact("embedding", sha256=b"short"),
        with_artifact("output", tensors=artifact("output", 8, 4).tensors[1:]),
        with_artifact("output", tensors=(TensorEntry("t", 0, (), 0, 12),)),
        with_artifact("output", tensors=(TensorEntry("t", 0, (0, 3), 0, 12),)),
        with_artifact("output", tensors=(TensorEntry("t", -1, (3,), 0, 12),)),
        with_artifact("output", tensors=(TensorEntry("t" * 65, 0, (3,), 0, 12),)),
        with_artifact("output", tensors=(TensorEntry("layer.0.0", 0, (3,), 0, 12),)),
    ],
)
def test_impossible_manifests_are_refused(bad):
    with pytest.raises(PeerError):
        decode_manifest(encode_manifest(bad))


def test_mutated_manifests_are_a_peers_error_or_another_manifest():
    data = encode_manifest(manifest())
    dice = random.Random(3)
    for _ in range(ROUNDS):
        mutated = bytearray(data)
        for _ in range(dice.randint(1, 3)):
            mutated[dice.randrange(len(mutated))] = dice.randrange(256)
        try:
            decode_manifest(bytes(mutated[: dice.randint(0, len(mutated))] if dice.random() < 0.2 else mutated))
        except PeerError:
            continue


def test_a_manifest_of_endless_depth_is_a_peers_error():
    deep = b"\x81\xa1x" + b"\x91" * 200_000 + b"\xc0"
    with pytest.raises(PeerError, match="not a manifest"):
        decode_manifest(deep, hashlib.sha256(deep).hexdigest())


def test_a_manifest_over_the_limit_is_refused_unread():
    with pytest.raises(PeerError, match="limit"):
        decode_manifest(bytes((16 << 20) + 1))


def test_artifact_names_come_in_one_order():
    assert artifact_names(2) == ("metadata", "embedding", "output", "shared", "layer.0", "layer.1")


def test_the_bytes_and_the_digest_of_a_manifest_never_change():
    """Cached slices are found by this digest: other bytes would fetch every model again."""
    golden = (
        "84a776657273696f6e01ac617263686974656374757265a56c6c616d61a66c617965727301a96172746966616374739494a86d65746164"
        "61746108c420"
        + 64 * "0"
        + "9094a9656d62656464696e6740c420"
        + 64 * "0"
        + "9195ab656d62656464696e672e30009110004094"
        "a66f75747075740cc420"
        + 64
        * "0"
        + "9295a86f75747075742e30009101000495a86f75747075742e31009102040894a76c617965722e"
        "3030c420" + 64 * "0" + "9295a96c617965722e302e30009104001095a96c617965722e302e310091081020"
    )
    data = encode_manifest(manifest(1))
    assert data.hex() == golden
    assert manifest_digest(manifest(1)) == "d01c5df2a9591c0a1e1d088df7b13e0089a9e912c80a6d9949d2859f19262c9f"
    assert msgpack.unpackb(data)["layers"] == 1  # an independent reader
