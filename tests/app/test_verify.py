"""Splits of every listed architecture give the bits of the whole, or are refused with a reason."""

import msgspec
import pytest

from meshnode.app.verify import VerifyReport, default_cuts, verify_model
from meshnode.errors import ConfigError, ModelError
from meshnode.io.llama.traits import traits_of
from tests.factory import build, quantize
from tests.factory.shapes import SHAPES
from tests.io.llama.test_slicing import keys_of

pytestmark = pytest.mark.native

LISTED = sorted(set(SHAPES) - {"lfm2"})


@pytest.mark.parametrize("arch", LISTED)
def test_three_slices_of_a_listed_architecture_are_exact(arch, tmp_path):
    report = verify_model(build(tmp_path / "m.gguf", arch, layers=8), stages=3)
    assert (report.verdict, report.cuts, report.max_abs_diff) == ("exact", (3, 5), 0.0), report.reason


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_slices_of_every_tensor_type_are_exact(kind, tmp_path):
    assert verify_model(build(tmp_path / "m.gguf", layers=4, kind=kind, tied=kind == "q8_0")).exact


@pytest.mark.parametrize("kind", ["q4_k_m", "q6_k"])
def test_slices_of_what_the_quantizer_of_llama_cpp_writes_are_exact(kind, tmp_path):
    source = build(tmp_path / "m.gguf", layers=4, embd=256, ff=256)
    assert verify_model(quantize(source, tmp_path / "q.gguf", kind)).exact


def test_a_model_in_several_files_is_exact_and_its_prediction_block_is_left_out(tmp_path):
    path = build(tmp_path / "m.gguf", "glm4", layers=5, nextn=1, shards=3)
    report = verify_model(path, stages=2)
    assert report.exact, report.reason
    assert report.layers == 5


@pytest.mark.parametrize(
    "keys",
    [
        {"attention.sliding_window_pattern": [True, False, False, True, False, True]},
        {"attention.sliding_window_pattern": 3},
        {},
    ],
    ids=["array", "scalar", "absent"],
)
@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_window_patterns_survive_cuts_that_do_not_fit_their_period(arch, keys, tmp_path):
    report = verify_model(build(tmp_path / "m.gguf", arch, layers=6, keys=keys), cuts=[1, 3, 5])
    assert report.exact, report


def test_slices_without_an_attention_layer_or_without_a_recurrent_one_are_exact(tmp_path):
    heads = [0, 0, 2, 2, 0, 0]
    path = build(tmp_path / "m.gguf", "lfm2", layers=6, keys={"attention.head_count_kv": heads})
    report = verify_model(path, cuts=[2, 4])
    assert report.exact, report


@pytest.mark.parametrize(("arch", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_a_layer_count_that_chooses_behaviour_is_refused_with_the_reason(arch, layers, tmp_path):
    report = verify_model(build(tmp_path / "m.gguf", arch, layers=layers, embd=32, ff=32, vocabulary=270))
    assert (report.verdict, report.exit_code) == ("not_splittable", 0)
    assert str(layers) in report.reason


@pytest.mark.parametrize(("layers", "extra"), [(27, {"attention.q_lora_rank": None}), (30, {})])
def test_deepseek2_is_split_only_where_its_layer_count_means_nothing(layers, extra, tmp_path):
    if extra:  # the 27-layer model has other tensors, and slices would need still others
        extra = {**extra, "attention.head_count": 2}
    path = build(tmp_path / "m.gguf", "deepseek2", layers=layers, embd=32, ff=32, heads=2, keys=extra)
    report = verify_model(path)
    assert report.verdict == ("not_splittable" if layers == 27 else "exact"), report


def test_a_cut_that_makes_a_slice_look_like_another_model_is_refused(tmp_path):
    path = build(tmp_path / "m.gguf", "gemma2", layers=48, embd=32, ff=32, vocabulary=270)
    report = verify_model(path, cuts=[2])
    assert report.verdict == "not_splittable"
    assert "46" in report.reason


def test_default_cuts_make_no_slice_that_looks_like_another_model():
    keys = keys_of("gemma2", attention__sliding_window=16)
    assert default_cuts(traits_of(keys, 92), 2) != (46,)


def test_cuts_that_do_not_ascend_are_the_users_mistake(tmp_path):
    path = build(tmp_path / "m.gguf", layers=4)
    for cuts in ([3, 2], [0], [4], [2, 2]):
        with pytest.raises(ConfigError):
            verify_model(path, cuts=cuts)


def test_more_stages_than_the_model_has_layers_are_the_users_mistake(tmp_path):
    path = build(tmp_path / "m.gguf", layers=4)
    assert verify_model(path, stages=4).cuts == (1, 2, 3)
    for stages in (5, 1, 0):
        with pytest.raises(ConfigError):
            verify_model(path, stages=stages)


def test_an_architecture_without_a_row_is_never_guessed_at(tmp_path):
    path = build(tmp_path / "m.gguf", layers=2)
    path.write_bytes(path.read_bytes().replace(b"llama", b"lloma"))
    report = verify_model(path)
    assert report.verdict == "not_splittable"
    assert "lloma" in report.reason


def test_an_abort_of_native_code_is_a_verdict(tmp_path):
    path = build(tmp_path / "m.gguf", "qwen3moe", layers=2, keys={"expert_used_count": 9})
    report = verify_model(path)
    assert (report.verdict, report.exit_code) == ("failed", 1)
    assert "signal" in report.reason


def test_a_file_that_is_no_model_is_an_error_with_a_hint(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"no model")
    with pytest.raises(ModelError) as refusal:
        verify_model(path)
    assert refusal.value.hint


def test_the_report_is_one_json_object(tmp_path):
    report = verify_model(build(tmp_path / "m.gguf", layers=2))
    assert msgspec.json.decode(msgspec.json.encode(report), type=VerifyReport) == report
