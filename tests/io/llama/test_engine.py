"""Slices of a model give the very bits of the whole."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from meshnode.errors import StageError
from meshnode.io.llama.engine import EngineOptions, Rows, SliceEngine
from meshnode.io.llama.gguf_file import open_model
from meshnode.io.llama.manifest import build_manifest, open_artifacts
from meshnode.io.llama.slicing import layout_embedding, layout_slice, write_slice
from tests.factory import build

pytestmark = pytest.mark.native

OPTIONS = EngineOptions(context=256, lanes=2, chunk=64, kv_type="f16", flash_attention=True, threads=1)


def cut(path, folder, cuts):
    """Write the slices between `cuts` and the embedding; return their paths."""
    model = open_model(path)
    manifest = build_manifest(model)
    with open_artifacts(model, manifest) as artifacts:
        write_slice(layout_embedding(model.keys, manifest), artifacts.read, folder / "embedding.gguf")
        for first, last in pairwise(cuts):
            write_slice(layout_slice(model.keys, manifest, first, last), artifacts.read, folder / f"{first}.gguf")
    return [folder / f"{first}.gguf" for first, _ in pairwise(cuts)]


class Chain:
    """Stages of one model, run one after the other in this process."""

    def __init__(self, path, folder, cuts, options=OPTIONS):
        self.stages = []
        for slice_path, (first, last) in zip(cut(path, folder, cuts), pairwise(cuts), strict=True):
            at_start, at_end = first == 0, last == cuts[-1]
            embedding = folder / "embedding.gguf" if at_start else None
            self.stages.append(SliceEngine.load(slice_path, embedding, options, first=at_start, last=at_end))

    def decode(self, tokens, positions, lanes, flags):
        values = self.stages[0].decode(rows(positions, lanes, flags, tokens))
        for stage in self.stages[1:]:
            values = stage.decode(rows(positions, lanes, flags, activations=values))
        return values.copy()

    def close(self):
        for stage in self.stages:
            stage.close()


def rows(positions, lanes, flags, tokens=None, activations=None):
    return Rows(list(positions), lanes, flags, tokens, activations)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def whole(model):
    engine = SliceEngine.load(model, None, OPTIONS, first=True, last=True)
    yield engine
    engine.close()


def test_three_slices_give_the_bits_of_the_whole_model(model, whole, tmp_path):
    chain = Chain(model, tmp_path, [0, 2, 5, 8])
    steps = [
        ([5, 6, 7, 8, 9, 10], range(6), [0] * 6, [False] * 5 + [True]),
        ([11], [6], [0], [True]),
        ([12, 13], [0, 1], [1, 1], [False, True]),
        ([14, 15], [7, 2], [0, 1], [True, True]),
    ]
    for tokens, positions, lanes, flags in steps:
        expected = whole.decode(rows(positions, lanes, flags, tokens))
        assert np.array_equal(chain.decode(tokens, positions, lanes, flags), expected)
    chain.close()


def test_a_lane_cut_back_and_a_copied_lane_continue_as_if_they_had_never_gone_on(whole):
    first = whole.decode(rows([0, 1, 2], [0] * 3, [False, False, True], [5, 6, 7])).copy()
    again = whole.decode(rows([3], [0], [True], [8])).copy()
    whole.copy(0, 1, 3)
    assert whole.trim(0, 2)
    assert whole.next_position(0) == 2
    assert np.allclose(whole.decode(rows([2], [0], [True], [7])), first, atol=1e-3)
    assert np.allclose(whole.decode(rows([3], [1], [True], [8])), again, atol=1e-3)


@pytest.mark.parametrize(
    "bad",
    [
        rows([0], [2], [True], [5]),
        rows([0], [0], [True], [512]),
        rows([0], [0], [True], [-1]),
        rows([], [], [], []),
        rows(range(65), [0] * 65, [False] * 65, [5] * 65),
        rows([0, 1], [0], [True], [5]),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_native_code_sees_them(whole, bad):
    with pytest.raises(StageError) as refusal:
        whole.decode(bad)
    assert refusal.value.reason == "bad_rows"


def test_a_full_cache_is_a_typed_error_and_the_lane_keeps_what_it_held(whole):
    for start in range(0, 256, 64):
        whole.decode(rows(range(start, start + 64), [0] * 64, [False] * 64, [5] * 64))
    with pytest.raises(StageError) as refusal:
        whole.decode(rows([256], [0], [True], [5]))
    assert refusal.value.reason == "no_kv_room"
    assert whole.next_position(0) == 256


def test_an_abort_ends_the_decode_with_a_typed_error_and_the_next_one_runs(whole):
    whole.abort()
    with pytest.raises(StageError) as refusal:
        whole.decode(rows([0], [0], [True], [5]))
    assert refusal.value.reason == "aborted"
    whole.clear(0)
    assert whole.decode(rows([0], [0], [True], [5])).shape == (1, 512)


def test_activations_that_are_not_finite_are_an_error_and_not_an_answer(model, tmp_path):
    chain = Chain(model, tmp_path, [0, 4, 8])
    poison = np.full((1, 64), np.nan, np.float32)
    with pytest.raises(StageError) as refusal:
        chain.stages[1].decode(rows([0], [0], [True], activations=poison))
    assert refusal.value.reason == "non_finite"
    chain.close()


@pytest.mark.parametrize("kv_unified", [True, False])
def test_a_copied_prefix_continues_alike_whether_lanes_share_their_cells_or_not(model, kv_unified):
    engine = SliceEngine.load(model, None, replace(OPTIONS, kv_unified=kv_unified), first=True, last=True)
    engine.decode(rows([0, 1, 2, 3], [0] * 4, [False] * 4, [5, 6, 7, 8]))
    engine.copy(0, 1, 3)
    assert (engine.next_position(0), engine.next_position(1)) == (4, 3)
    here = engine.decode(rows([4], [0], [True], [9])).copy()
    engine.trim(0, 3)
    engine.decode(rows([3], [1], [False], [8]))
    assert np.allclose(engine.decode(rows([4], [1], [True], [9])), here, atol=1e-3)
    with pytest.raises(StageError) as refusal:
        engine.copy(0, 1, 9)
    assert refusal.value.reason == "bad_copy"
    engine.close()
    engine.close()


def test_several_lanes_in_one_microbatch_through_an_overwritten_input_are_exact(tmp_path):
    path = build(tmp_path / "gemma.gguf", "gemma", layers=4)
    chain = Chain(path, tmp_path, [0, 1, 4])
    whole = SliceEngine.load(path, None, OPTIONS, first=True, last=True)
    for tokens, positions, lanes in (([5, 6, 7], [0, 1, 0], [0, 0, 1]), ([8, 9], [2, 1], [0, 1]), ([3], [2], [1])):
        flags = [True] * len(tokens)
        expected = whole.decode(rows(positions, lanes, flags, tokens))
        assert np.array_equal(chain.decode(tokens, positions, lanes, flags), expected)
    whole.close()
    chain.close()


def test_a_recurrent_slice_takes_one_lane_a_microbatch_and_whole_lanes_only(tmp_path):
    heads = [0, 2, 0, 2]
    path = build(tmp_path / "lfm2.gguf", "lfm2", layers=4, keys={"attention.head_count_kv": heads})
    engine = SliceEngine.load(path, None, OPTIONS, first=True, last=True)
    assert (engine.one_lane, engine.trim_any) == (True, False)
    with pytest.raises(StageError) as refusal:
        engine.decode(rows([0, 0], [0, 1], [True, True], [5, 6]))
    assert refusal.value.reason == "bad_rows"
    engine.decode(rows([0, 1], [0, 0], [False, True], [5, 6]))
    assert not engine.trim(0, 1)
    engine.copy(0, 1, 2)
    with pytest.raises(StageError) as refusal:
        engine.copy(0, 1, 1)
    assert refusal.value.reason == "bad_copy"
    expected = engine.decode(rows([2], [0], [True], [7])).copy()
    assert np.array_equal(engine.decode(rows([2], [1], [True], [7])), expected)
    engine.close()


def test_a_rehearsal_computes_nothing_and_changes_nothing(model, whole, tmp_path):
    chain = Chain(model, tmp_path, [0, 4, 8])
    for position, token in enumerate((5, 6, 7)):
        expected = whole.decode(rows([position], [0], [True], [token])).copy()
        row = rows([position], [0], [True], [token])
        onward = chain.stages[0].decode(row).copy()
        activations = rows([position], [0], [True], activations=onward)
        assert np.array_equal(chain.stages[1].decode(activations), expected)
        chain.stages[0].rehearse(row)
        chain.stages[1].rehearse(activations)
        assert [stage.next_position(0) for stage in chain.stages] == [position + 1] * 2
    with pytest.raises(StageError):
        chain.stages[0].rehearse(rows([3], [0], [True], [512]))
    chain.close()


def test_a_tap_that_the_graph_never_computes_fails_the_load(model, tmp_path):
    path = cut(model, tmp_path, [0, 4, 8])[0]
    path.write_bytes(path.read_bytes().replace(b"l_out-3", b"l_out-9"))
    with pytest.raises(StageError) as refusal:
        SliceEngine.load(path, tmp_path / "embedding.gguf", OPTIONS, first=True, last=False)
    assert refusal.value.reason == "tap_missed"


def test_a_load_can_be_stopped_and_a_file_that_llama_cpp_refuses_says_why(model, tmp_path):
    with pytest.raises(StageError) as refusal:
        SliceEngine.load(model, None, OPTIONS, first=True, last=True, progress=lambda fraction: False)
    assert refusal.value.reason == "cancelled"
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes().replace(b"blk.3.attn_q.weight", b"blk.3.attn_x.weight"))
    with pytest.raises(StageError, match="attn_") as refusal:
        SliceEngine.load(broken, None, OPTIONS, first=True, last=True)
    assert refusal.value.reason == "load_failed"


def test_a_slice_is_loaded_only_as_the_stage_it_was_cut_for(model, tmp_path):
    first, last = cut(model, tmp_path, [0, 4, 8])
    embedding = tmp_path / "embedding.gguf"
    for path, table, ends in (
        (last, embedding, (True, False)),
        (first, None, (False, True)),
        (first, None, (True, False)),
    ):
        with pytest.raises(StageError) as refusal:
            SliceEngine.load(path, table, OPTIONS, first=ends[0], last=ends[1])
        assert refusal.value.reason == "load_failed"


@pytest.mark.parametrize("wrong", [{"lanes": 0}, {"lanes": 257}, {"chunk": 0}, {"kv_type": "q5_1"}])
def test_options_that_are_not_possible_are_refused(model, wrong):
    with pytest.raises(StageError) as refusal:
        SliceEngine.load(model, None, replace(OPTIONS, **wrong), first=True, last=True)
    assert refusal.value.reason == "bad_options"


def test_the_fingerprint_tells_options_apart_and_memory_is_reported_by_kind(model, whole):
    other = SliceEngine.load(model, None, replace(OPTIONS, flash_attention=False), first=True, last=True)
    assert len({whole.fingerprint(), other.fingerprint()}) == 2
    assert {"model", "kv", "compute"} <= set(other.memory_bytes())
    other.close()


def test_logits_of_a_chunk_come_for_the_flagged_rows_only(whole):
    assert whole.decode(rows(range(10), [0] * 10, [False] * 10, [5] * 10)).shape == (0, 512)
    flags = [index in (2, 7) for index in range(10)]
    assert whole.decode(rows(range(10, 20), [0] * 10, flags, [5] * 10)).shape == (2, 512)
    with pytest.raises(StageError):
        whole.decode(rows(range(20, 60), [0] * 40, [True] * 40, [5] * 40))
