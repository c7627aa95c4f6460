"""What the planner is told equals what llama.cpp takes."""

import msgspec
import pytest

from meshnode.core.planning.footprint import kv_bytes
from meshnode.errors import ModelError
from meshnode.io.llama.engine import EngineOptions, SliceEngine
from meshnode.io.llama.footprint import footprint_of_parts, read_footprint
from meshnode.io.llama.gguf_file import open_model
from meshnode.io.llama.manifest import build_manifest, metadata_bytes
from tests.factory import build

CONTEXT, LANES = 2048, 4
# llama.cpp reports MiB to two decimals.
ROUNDING = 10_486
FAMILIES = ["llama", "gpt2", "gemma3", "deepseek2", "gpt-oss", "lfm2"]


def families_model(arch, tmp_path):
    keys = {"attention.head_count_kv": [0, 2, 0, 2, 0, 0]} if arch == "lfm2" else None
    return build(tmp_path / "m.gguf", arch, layers=6, embd=256, keys=keys)


@pytest.mark.native
@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_planned_cache_and_state_are_what_llama_cpp_reports(arch, kv_type, tmp_path):
    path = families_model(arch, tmp_path)
    plan = read_footprint(path)
    options = EngineOptions(CONTEXT, LANES, 64, kv_type, plan.flash_attention, threads=1)
    engine = SliceEngine.load(path, None, options, first=True, last=True)
    reported = engine.memory_bytes()
    engine.close()
    cache = sum(kv_bytes(layer.kv_values, kv_type) for layer in plan.layers) * CONTEXT
    # Two caches where an architecture has windows, each rounded for itself.
    assert reported["kv"] == pytest.approx(cache, abs=2 * ROUNDING)
    assert reported.get("rs", 0) == pytest.approx(sum(layer.state_bytes for layer in plan.layers) * LANES, abs=ROUNDING)
    weights = sum(layer.weight_bytes for layer in plan.layers) + plan.output_bytes + plan.shared_bytes
    table = 0 if plan.tied else plan.embedding_bytes
    assert reported["model"] == pytest.approx(weights + table, rel=0.01, abs=2 * ROUNDING)


def test_a_footprint_names_sizes_widths_and_the_trained_context(tmp_path):
    plan = read_footprint(build(tmp_path / "m.gguf", layers=3, embd=64, vocabulary=512, context=256), "d" * 64)
    assert (plan.manifest_digest, plan.name, plan.architecture) == ("d" * 64, "m", "llama")
    assert (plan.width, plan.vocabulary, plan.context_trained, len(plan.layers)) == (64, 512, 256, 3)
    assert plan.embedding_bytes == 64 * 512 * 4
    assert plan.output_bytes == 64 * 512 * 4 + 64 * 4
    assert plan.layers[0].kv_values == 2 * 2 * 16
    assert (plan.boundaries, plan.whole_only, plan.tied) == ((1, 2), "", False)


def test_a_tied_table_counts_on_the_last_slice_too(tmp_path):
    plan = read_footprint(build(tmp_path / "m.gguf", layers=2, tied=True))
    assert plan.tied
    assert plan.output_bytes > plan.embedding_bytes


@pytest.mark.parametrize(("embd", "kv_type"), [(128, "q8_0"), (80, "f16"), (320, "f16")])
def test_the_cache_is_q8_0_where_heads_are_whole_blocks_and_f16_elsewhere(embd, kv_type, tmp_path):
    assert read_footprint(build(tmp_path / "m.gguf", layers=2, embd=embd, ff=32)).kv_type == kv_type


def test_what_cannot_be_split_reaches_the_plan_with_its_reason(tmp_path):
    plan = read_footprint(build(tmp_path / "m.gguf", "gemma2", layers=46, embd=32, ff=32, vocabulary=270))
    assert "46" in plan.whole_only
    assert plan.boundaries == ()
    other = read_footprint(build(tmp_path / "n.gguf", "gemma2", layers=47, embd=32, ff=32, vocabulary=270))
    assert other.forbidden_lengths == (46,)
    assert other.all_kinds_in_each_slice


@pytest.mark.parametrize("missing", ["context_length", "embedding_length"])
def test_a_header_without_what_planning_needs_is_refused(missing, tmp_path):
    with pytest.raises(ModelError):
        read_footprint(build(tmp_path / "m.gguf", layers=2, keys={missing: None}))


def test_a_token_reads_the_experts_that_it_is_sent_to_and_everything_else_of_a_layer(tmp_path):
    mixture = read_footprint(build(tmp_path / "m.gguf", "qwen3moe", layers=2)).layers[0]
    whole = read_footprint(build(tmp_path / "w.gguf", "qwen3moe", layers=2, keys={"expert_used_count": 4})).layers[0]
    assert whole.read_bytes == whole.weight_bytes == mixture.weight_bytes
    assert mixture.weight_bytes / 2 < mixture.read_bytes < mixture.weight_bytes  # two of four, and attention
    plain = read_footprint(build(tmp_path / "p.gguf", layers=2)).layers[0]
    assert plain.read_bytes == plain.weight_bytes


@pytest.mark.parametrize("arch", [*FAMILIES, "qwen3moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_who_has_only_metadata_and_manifest_counts_as_who_has_the_file(arch, tied, tmp_path):
    path = build(tmp_path / "m.gguf", arch, layers=4, tied=tied) if arch != "lfm2" else families_model(arch, tmp_path)
    opened = open_model(path)
    metadata = tmp_path / "metadata.gguf"
    metadata.write_bytes(metadata_bytes(opened))
    found = footprint_of_parts(metadata, build_manifest(opened), "d" * 64)
    assert msgspec.structs.replace(found, name="m") == read_footprint(path, "d" * 64)
