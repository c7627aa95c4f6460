"""Slices of a model give the very bits of the whole."""

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
    numbers = [np.asarray(item, np.int32) for item in (positions, lanes)]
    tokens = None if tokens is None else np.asarray(tokens, np.int32)
    return Rows(*numbers, np.asarray(flags, np.bool_), tokens, activations)


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
