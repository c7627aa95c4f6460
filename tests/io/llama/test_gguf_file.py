"""A GGUF is hostile: whatever it holds, reading it is a description or one ModelError."""

import random
import struct

import pytest

from meshnode.errors import ModelError
from meshnode.io.llama.gguf_file import encode_header, open_model, tensor_bytes
from meshnode.io.llama.gguf_values import ValueType, make_array, make_scalar
from tests.factory import build

ROUNDS = 1_000


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return build(tmp_path_factory.mktemp("gguf") / "small.gguf", layers=1, embd=32, ff=32, vocabulary=270)


def header(keys=(), tensors=(), version=3, counts=None):
    tensor_count, key_count = counts or (len(tensors), len(keys))
    parts = [b"GGUF", struct.pack("<IQQ", version, tensor_count, key_count), *(item.encoded() for item in keys)]
    for name, rank, dims, kind, offset in tensors:
        parts += [struct.pack("<Q", len(name)), name, struct.pack(f"<I{len(dims)}Q", rank, *dims)]
        parts.append(struct.pack("<IQ", kind, offset))
    data = b"".join(parts)
    return data + bytes(-len(data) % 32)


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(ModelError) as refusal:
        open_model(path)
    return str(refusal.value)


def test_every_value_type_is_read_as_it_was_written(tmp_path):
    keys = [
        make_scalar("a.float", ValueType.FLOAT64, 0.5),
        make_scalar("a.text", ValueType.STRING, "größe"),
        make_scalar("a.flag", ValueType.BOOL, True),
        make_array("a.numbers", ValueType.INT32, [-1, 2]),
        make_array("a.words", ValueType.STRING, ["", "zwei"]),
    ]
    path = tmp_path / "m.gguf"
    path.write_bytes(encode_header(keys, [("t", 0, (4, 2), 0)]) + bytes(32))
    model = open_model(path)
    assert model.keys == tuple(keys)
    assert [item.items() if item.count is not None else item.scalar() for item in model.keys] == [
        0.5,
        "größe",
        True,
        [-1, 2],
        ["", "zwei"],
    ]
    assert (model.tensors[0].dims, model.tensors[0].size) == ((4, 2), 32)


def test_a_scalar_is_no_array_and_an_array_no_scalar():
    with pytest.raises(ModelError):
        make_scalar("a", ValueType.UINT8, 1).items()
    with pytest.raises(ModelError):
        make_array("a", ValueType.UINT8, [1]).scalar()


def test_a_file_cut_anywhere_is_refused(small, tmp_path):
    data = small.read_bytes()
    whole = open_model(small)
    edges = [whole.tensors[-1].offset + whole.tensors[-1].size - 1, whole.tensors[0].offset, 100, 24, 23, 4, 3, 1]
    for end in [*edges, *random.Random(5).sample(range(len(data) - 64), 100)]:
        assert refused(tmp_path / "cut.gguf", data[:end])


def test_mutated_bytes_give_a_model_or_a_model_error_and_nothing_else(small, tmp_path):
    data = small.read_bytes()
    path = tmp_path / "mutated.gguf"
    start = open_model(small).tensors[0].offset
    dice = random.Random(7)
    outcomes = set()
    for _ in range(ROUNDS):
        mutated = bytearray(data)
        for _ in range(dice.randint(1, 4)):
            mutated[dice.randrange(start)] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
        path.write_bytes(mutated)
        try:
            open_model(path)
            outcomes.add("model")
        except ModelError:
            outcomes.add("refused")
    assert outcomes == {"model", "refused"}


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"GGML" + bytes(60), "GGUF"),
        (header(version=1), "version"),
        (header(version=0x03000000), "version"),
        (header(counts=(1 << 60, 0)), "more than any model"),
        (header(counts=(0, 1 << 60)), "more than any model"),
        (header(counts=(0, 1))[:24] + struct.pack("<Q", 1 << 40), "a key"),
        (header([make_scalar("a", ValueType.UINT8, 1)] * 2), "twice"),
        (header(tensors=[(b"t", 5, (1,) * 5, 0, 0)]), "dimensions"),
        (header(tensors=[(b"t", 0, (), 0, 0)]), "dimensions"),
        (header(tensors=[(b"t", 2, (0, 4), 0, 0)]), "shape"),
        (header(tensors=[(b"t", 2, (1 << 62, 1 << 62), 0, 0)]), "shape"),
        (header(tensors=[(b"t", 1, (32,), 99, 0)]), "type 99"),
        (header(tensors=[(b"t", 1, (33,), 8, 0)]), "multiple"),
        (header(tensors=[(b"t", 1, (8,), 0, 64)]), "outside"),
        (header(tensors=[(b"t", 1, (8,), 0, 4)]) + bytes(64), "outside"),
        (header(tensors=[(b"t" * 65, 1, (8,), 0, 0)]) + bytes(64), "a tensor name"),
        (header(tensors=[(b"a", 1, (8,), 0, 0), (b"b", 1, (8,), 0, 0)]) + bytes(64), "overlap"),
        (header(tensors=[(b"a", 1, (8,), 0, 0), (b"a", 1, (8,), 0, 32)]) + bytes(64), "twice"),
        (header([make_scalar("general.alignment", ValueType.UINT32, 3)]), "alignment"),
        (header([make_scalar("general.alignment", ValueType.UINT32, 0)]), "alignment"),
    ],
)
def test_impossible_headers_are_refused_with_what_is_wrong(data, word, tmp_path):
    assert word in refused(tmp_path / "m.gguf", data)


def test_arrays_are_checked_against_the_file_before_anything_is_allocated(tmp_path):
    for kind in (ValueType.UINT64, ValueType.STRING, ValueType.ARRAY):
        array = struct.pack("<Q1sIIQ", 1, b"k", ValueType.ARRAY, kind, 1 << 55)
        refused(tmp_path / "m.gguf", header(counts=(0, 1))[:24] + array + bytes(64))


def test_a_missing_file_and_a_folder_are_model_errors(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelError):
            open_model(path)


def test_the_first_shard_gives_all_and_a_missing_one_is_named(tmp_path):
    path = build(tmp_path / "m.gguf", layers=4, shards=3)
    model = open_model(path)
    assert len(model.files) == 3
    assert {tensor.file for tensor in model.tensors} == {0, 1, 2}
    with pytest.raises(ModelError, match="first"):
        open_model(model.files[1])
    model.files[2].unlink()
    with pytest.raises(ModelError, match="00003-of-00003"):
        open_model(path)


def test_a_renamed_shard_is_refused_with_how_to_name_it(tmp_path):
    path = build(tmp_path / "m.gguf", layers=4, shards=2)
    renamed = path.rename(tmp_path / "other.gguf")
    with pytest.raises(ModelError) as refusal:
        open_model(renamed)
    assert "00001-of" in refusal.value.hint


def test_a_vocabulary_of_150000_costs_no_string_objects(tmp_path):
    path = tmp_path / "m.gguf"
    words = make_array("tokenizer.ggml.tokens", ValueType.STRING, [f"token{index}" for index in range(150_000)])
    path.write_bytes(encode_header([words], []) + bytes(32))
    assert open_model(path).keys[0].count == 150_000


def test_bytes_of_tensors_follow_their_blocks():
    assert tensor_bytes(0, (4, 3)) == 48
    assert tensor_bytes(8, (64, 2)) == 4 * 34
    assert tensor_bytes(12, (256,)) == 144
