"""A slice file holds exactly what its layers need, and is there whole or not at all."""

import hashlib
import os

import pytest
from msgspec.structs import replace

from meshnode.errors import ModelError
from meshnode.io.llama.gguf_file import open_model
from meshnode.io.llama.gguf_values import ValueType, make_array, make_scalar
from meshnode.io.llama.manifest import build_manifest, open_artifacts
from meshnode.io.llama.slice_keys import INTO_KEY, TAP_KEY, LayerUse, slice_keys, slice_order
from meshnode.io.llama.slicing import layout_embedding, layout_slice, write_slice
from meshnode.io.llama.traits import traits_of
from tests.factory import build


class Source:
    """A model, its manifest, and slices of it written to a folder."""

    def __init__(self, folder, *arguments, **options):
        self.folder = folder
        self.model = open_model(build(folder / "m.gguf", *arguments, **options))
        self.manifest = build_manifest(self.model)

    def write(self, layout, name="slice.gguf"):
        with open_artifacts(self.model, self.manifest) as artifacts:
            write_slice(layout, artifacts.read, self.folder / name)
        return open_model(self.folder / name)

    def slice(self, first, last):
        return self.write(layout_slice(self.model.keys, self.manifest, first, last), f"{first}-{last}.gguf")

    def bytes_of(self, model, name):
        tensor = model.by_name[name]
        with model.files[tensor.file].open("rb") as file:
            file.seek(tensor.offset)
            return file.read(tensor.size)


def test_layers_are_numbered_from_zero_and_their_bytes_are_those_of_the_model(tmp_path):
    source = Source(tmp_path, layers=5)
    middle = source.slice(2, 4)
    assert middle.scalar("llama.block_count") == 2
    for name in ("attn_q.weight", "ffn_down.weight"):
        for index in (0, 1):
            ours = source.bytes_of(middle, f"blk.{index}.{name}")
            assert ours == source.bytes_of(source.model, f"blk.{index + 2}.{name}")
    assert not any(name.startswith("blk.2.") for name in middle.by_name)


def test_only_the_last_slice_has_a_vocabulary(tmp_path):
    source = Source(tmp_path, layers=4)
    first, last = source.slice(0, 2), source.slice(2, 4)
    assert first.by_name["token_embd.weight"].dims == first.by_name["output.weight"].dims == (64, 32)
    assert first.scalar("tokenizer.ggml.model") == "no_vocab"
    assert "tokenizer.ggml.tokens" not in first.by_key
    assert not any(source.bytes_of(first, "output.weight"))
    assert last.by_key["tokenizer.ggml.tokens"] == source.model.by_key["tokenizer.ggml.tokens"]
    assert source.bytes_of(last, "output.weight") == source.bytes_of(source.model, "output.weight")


def test_a_tied_model_brings_its_table_to_the_last_slice(tmp_path):
    source = Source(tmp_path, layers=2, tied=True)
    last = source.slice(1, 2)
    table = "token_embd.weight"
    assert source.bytes_of(last, table) == source.bytes_of(source.model, table)


def test_the_table_that_nothing_reads_is_a_hole_of_a_small_type(tmp_path):
    source = Source(tmp_path, layers=2, embd=256, vocabulary=8192)
    layout = layout_slice(source.model.keys, source.manifest, 1, 2)
    last = source.write(layout)
    table = last.by_name["token_embd.weight"]
    assert table.dims == (256, 8192)
    assert table.size < source.model.by_name["token_embd.weight"].size / 20
    assert layout.size - layout.bytes_copied > table.size
    assert os.stat(tmp_path / "slice.gguf").st_blocks * 512 < layout.size


def test_the_embedding_file_is_the_table_alone(tmp_path):
    source = Source(tmp_path, layers=2)
    alone = source.write(layout_embedding(source.model.keys, source.manifest))
    assert list(alone.by_name) == ["token_embd.weight"]
    name = "token_embd.weight"
    assert source.bytes_of(alone, name) == source.bytes_of(source.model, name)


def test_all_layers_in_one_slice_are_the_model_again(tmp_path):
    source = Source(tmp_path, "glm4", layers=3, nextn=1)
    whole = source.slice(0, 3)
    assert whole.scalar("glm4.block_count") == 3
    assert whole.scalar("glm4.nextn_predict_layers") == 0
    kept = [name for name in source.model.by_name if not name.startswith("blk.3.")]
    assert sorted(whole.by_name) == sorted(kept)
    assert all(source.bytes_of(whole, name) == source.bytes_of(source.model, name) for name in kept)


def test_a_slice_is_written_from_ranges_alone_and_is_the_same_everywhere(tmp_path):
    source = Source(tmp_path, layers=4)
    layout = layout_slice(source.model.keys, source.manifest, 1, 3)
    with open_artifacts(source.model, source.manifest) as artifacts:
        fetched = {item.name: artifacts.read(item.name, 0, item.size) for item in source.manifest.artifacts}
    metadata = tmp_path / "metadata.gguf"
    metadata.write_bytes(fetched["metadata"])
    elsewhere = layout_slice(open_model(metadata).keys, source.manifest, 1, 3)
    assert elsewhere == layout
    write_slice(layout, lambda name, offset, length: fetched[name][offset : offset + length], tmp_path / "b.gguf")
    source.write(layout, "a.gguf")
    a, b = (hashlib.sha256((tmp_path / name).read_bytes()).digest() for name in ("a.gguf", "b.gguf"))
    assert a == b


def test_a_slice_that_cannot_be_written_whole_leaves_nothing_behind(tmp_path):
    source = Source(tmp_path, layers=2)
    layout = layout_slice(source.model.keys, source.manifest, 0, 1)
    with pytest.raises(ModelError, match="shorter"):
        write_slice(layout, lambda name, offset, length: b"", tmp_path / "slice.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("bounds", [(0, 0), (2, 1), (-1, 2), (0, 5)])
def test_bounds_outside_the_model_are_refused(bounds, tmp_path):
    source = Source(tmp_path, layers=4)
    with pytest.raises(ModelError):
        layout_slice(source.model.keys, source.manifest, *bounds)


def test_a_manifest_that_contradicts_itself_or_its_metadata_is_refused(tmp_path):
    source = Source(tmp_path, layers=2)
    whole = source.manifest

    def changed(name, /, **changes):
        first, *others = whole.artifact(name).tensors
        artifact = replace(whole.artifact(name), tensors=(replace(first, **changes), *others))
        return replace(whole, artifacts=tuple(artifact if item.name == name else item for item in whole.artifacts))

    impossible = [
        changed("embedding", dims=(1 << 40, 1 << 20)),
        changed("embedding", type=99),
        changed("layer.1", name="blk.0.extra.weight"),
        changed("output", name="blk.0.extra.weight"),
        replace(whole, architecture="qwen2"),
        replace(whole, layers=1, artifacts=whole.artifacts[:-1]),
    ]
    for manifest in impossible:
        with pytest.raises(ModelError):
            layout_slice(source.model.keys, manifest, 0, 1)


def test_an_unknown_array_of_one_value_a_layer_is_refused_and_not_copied(tmp_path):
    source = Source(tmp_path, layers=4, keys={"some.new_thing": [1, 2, 3, 4]})
    with pytest.raises(ModelError, match="new_thing"):
        source.slice(0, 2)


def test_arrays_that_only_look_per_layer_are_copied(tmp_path):
    source = Source(tmp_path, layers=4, keys={"rope.dimension_sections": [1, 2, 3, 0], "some.short": [1, 2]})
    cut = source.slice(1, 2)
    assert cut.by_key["llama.rope.dimension_sections"].items() == [1, 2, 3, 0]
    assert cut.by_key["llama.some.short"].items() == [1, 2]


def test_position_tables_are_zeros_behind_the_first_slice(tmp_path):
    source = Source(tmp_path, "gpt2", layers=4)
    name = "position_embd.weight"
    assert source.bytes_of(source.slice(0, 2), name) == source.bytes_of(source.model, name)
    assert not any(source.bytes_of(source.slice(2, 4), name))


def keys_of(architecture, **values):
    made = [make_scalar("general.architecture", ValueType.STRING, architecture)]
    for name, value in values.items():
        key = f"{architecture}.{name.replace('__', '.')}"
        if isinstance(value, list):
            made.append(make_array(key, ValueType.UINT32, value))
        else:
            made.append(make_scalar(key, ValueType.FLOAT32 if isinstance(value, float) else ValueType.UINT32, value))
    return made


def sliced(keys, layers, first, last):
    traits = traits_of(keys, layers)
    order = slice_order(traits, first, last)
    made = {item.key: item for item in slice_keys(keys, traits, order)}
    return order, {key: item.items() if item.count is not None else item.scalar() for key, item in made.items()}


def test_a_slice_says_its_windows_as_an_array_and_borrows_a_layer_it_lacks():
    keys = keys_of("gpt-oss", attention__sliding_window=128, block_count=6)
    order, values = sliced(keys, 6, 1, 2)  # layers 1, 3 and 5 look at everything
    assert order == [LayerUse(1), LayerUse(0, passing=True)]
    assert values["gpt-oss.attention.sliding_window_pattern"] == [False, True]
    assert values["gpt-oss.block_count"] == 2
    assert values[TAP_KEY] == "l_out-0"
    order, values = sliced(keys, 6, 5, 6)
    assert order[0].passing
    assert (values[TAP_KEY], values[INTO_KEY]) == ("", "")


def test_later_slices_take_the_scale_of_every_input_as_one():
    keys = keys_of("granite", embedding_scale=6.0, block_count=4)
    assert sliced(keys, 4, 0, 2)[1]["granite.embedding_scale"] == 6.0
    assert sliced(keys, 4, 2, 4)[1]["granite.embedding_scale"] == 1.0
    minicpm = keys_of("minicpm", block_count=4)
    values = sliced(minicpm, 4, 2, 4)[1]
    assert values["minicpm.embedding_scale"] == 1.0
    assert values["minicpm.residual_scale"] == pytest.approx(0.7)


def test_leading_dense_layers_count_from_the_slices_first():
    keys = keys_of("deepseek2", leading_dense_block_count=3, block_count=8)
    leads = [sliced(keys, 8, first, 8)[1]["deepseek2.leading_dense_block_count"] for first in (1, 2, 3, 5)]
    assert leads == [2, 1, 0, 0]


def test_experts_in_every_second_layer_stay_where_they_are():
    keys = keys_of("ernie4_5-moe", interleave_moe_layer_step=2, leading_dense_block_count=1, block_count=6)
    assert traits_of(keys, 6).boundaries == (2, 4, 5)
    assert sliced(keys, 6, 2, 6)[1]["ernie4_5-moe.interleave_moe_layer_step"] == 2
    assert sliced(keys, 6, 5, 6)[1]["ernie4_5-moe.interleave_moe_layer_step"] == 1


def test_the_input_is_overwritten_at_the_embedding_first_and_behind_the_scale_later():
    keys = keys_of("gemma", block_count=4)
    assert sliced(keys, 4, 0, 2)[1][INTO_KEY] == "embd"
    assert sliced(keys, 4, 2, 4)[1][INTO_KEY] == "inp_scaled"
