"""A model as artifacts: the same bytes give the same digest, and ranges read back are what was hashed."""

import hashlib

import pytest

from meshnode.errors import ModelError
from meshnode.io.llama.gguf_file import open_model
from meshnode.io.llama.manifest import Cancelled, artifact_of, build_manifest, layer_count, open_artifacts
from meshnode.wire.manifest import decode_manifest, encode_manifest, manifest_digest
from tests.factory import build


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return open_model(build(tmp_path_factory.mktemp("manifest") / "m.gguf", layers=3))


@pytest.fixture(scope="module")
def manifest(model):
    return build_manifest(model)


def test_every_artifact_reads_back_as_what_was_hashed(model, manifest):
    with open_artifacts(model, manifest) as artifacts:
        for item in manifest.artifacts:
            data = artifacts.read(item.name, 0, item.size)
            assert hashlib.sha256(data).digest() == item.sha256
            middle = artifacts.read(item.name, item.size // 3, item.size // 3)
            assert middle == data[item.size // 3 : 2 * (item.size // 3)]


def test_what_is_sent_is_what_a_peer_accepts(manifest):
    assert decode_manifest(encode_manifest(manifest), manifest_digest(manifest)) == manifest


def test_the_metadata_artifact_is_a_gguf_of_all_keys_and_no_tensors(model, manifest, tmp_path):
    with open_artifacts(model, manifest) as artifacts:
        (tmp_path / "metadata.gguf").write_bytes(artifacts.read("metadata", 0, manifest.artifact("metadata").size))
    metadata = open_model(tmp_path / "metadata.gguf")
    assert (metadata.keys, metadata.tensors) == (model.keys, ())


def test_the_same_model_in_one_file_and_in_three_has_one_digest(tmp_path):
    (tmp_path / "a").mkdir()
    one = build(tmp_path / "same.gguf", layers=3)
    three = build(tmp_path / "a" / "same.gguf", layers=3, shards=3)
    assert manifest_digest(build_manifest(open_model(one))) == manifest_digest(build_manifest(open_model(three)))


def test_prediction_blocks_belong_to_no_artifact(tmp_path):
    model = open_model(build(tmp_path / "m.gguf", "glm4", layers=3, nextn=1))
    assert layer_count(model) == 3
    assert artifact_of("blk.3.attn_norm.weight", 3) is None
    names = {tensor.name for item in build_manifest(model).artifacts for tensor in item.tensors}
    assert not any(name.startswith("blk.3.") for name in names)


def test_progress_counts_every_byte_and_can_stop(model, manifest):
    seen = []
    build_manifest(model, lambda done, total: seen.append((done, total)) is None)
    assert seen[-1][0] == seen[-1][1] == model.bytes_total
    with pytest.raises(Cancelled):
        build_manifest(model, lambda done, total: False)


@pytest.mark.parametrize(
    "place", [("layer.0", -1, 4), ("layer.0", 0, 1 << 40), ("layer.9", 0, 4), ("metadata", 1, 1 << 30)]
)
def test_ranges_that_an_artifact_does_not_have_are_refused(model, manifest, place):
    with open_artifacts(model, manifest) as artifacts, pytest.raises(ModelError):
        artifacts.read(*place)


def test_a_file_that_became_shorter_is_an_error_and_not_a_hang(tmp_path):
    path = build(tmp_path / "m.gguf", layers=2)
    model = open_model(path)
    path.write_bytes(path.read_bytes()[:-8192])
    with pytest.raises(ModelError, match="shorter"):
        build_manifest(model)


@pytest.mark.parametrize(
    "keys", [{"block_count": 0}, {"block_count": 9999}, {"block_count": 2, "nextn_predict_layers": 2}]
)
def test_layer_counts_that_make_no_sense_are_refused(tmp_path, keys):
    with pytest.raises(ModelError):
        layer_count(open_model(build(tmp_path / "m.gguf", layers=2, keys=keys)))
