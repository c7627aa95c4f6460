"""Activations are read from a tensor that the graph keeps, where that gives the bits that the callback gives."""

from itertools import pairwise

import numpy as np
import pytest

from meshnode.errors import StageError
from meshnode.io.llama import engine as engine_module
from meshnode.io.llama import native
from meshnode.io.llama.engine import EngineOptions, Rows, SliceEngine
from meshnode.io.llama.gguf_file import open_model
from meshnode.io.llama.kept_tap import KeptTap
from meshnode.io.llama.manifest import build_manifest, open_artifacts
from meshnode.io.llama.slicing import layout_embedding, layout_slice, write_slice
from meshnode.io.llama.tap import Tap
from tests.factory import build

pytestmark = pytest.mark.native

OPTIONS = EngineOptions(context=1024, lanes=3, chunk=64, kv_type="f16", flash_attention=True, threads=1)


def first_slice(folder, cuts, *model):
    path = build(folder / "model.gguf", *model, layers=cuts[-1])
    opened = open_model(path)
    manifest = build_manifest(opened)
    with open_artifacts(opened, manifest) as artifacts:
        write_slice(layout_embedding(opened.keys, manifest), artifacts.read, folder / "embedding.gguf")
        for first, last in pairwise(cuts):
            write_slice(layout_slice(opened.keys, manifest, first, last), artifacts.read, folder / f"{first}.gguf")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return first_slice(tmp_path_factory.mktemp("llama"), [0, 4, 8])


def load(folder, options=OPTIONS):
    return SliceEngine.load(folder / "0.gguf", folder / "embedding.gguf", options, first=True, last=False)


def without_kept_tap(monkeypatch):
    """As on a library that takes no sampler of ours."""

    def refuse(*_):
        raise StageError("load_failed", "no")

    monkeypatch.setattr(engine_module, "KeptTap", refuse)


def test_its_rows_are_those_of_the_callback_in_every_shape_and_beyond_a_new_graph(folder, monkeypatch):
    kept = load(folder)
    without_kept_tap(monkeypatch)
    callback = load(folder)
    assert (type(kept._tap), type(callback._tap)) == (KeptTap, Tap)
    steps = [(range(start, start + 64), [0] * 64) for start in range(0, 256, 64)]
    # Beyond 256 positions llama.cpp builds the graph anew; then rows of several lanes, and one alone again.
    steps += [([256 + step], [0]) for step in range(4)]
    steps += [([260, 0, 0], [0, 1, 2]), ([1, 2], [1, 1]), ([3], [1])]
    for positions, lanes in steps:
        tokens = [5 + 3 * position % 400 for position in positions]
        rows = Rows(list(positions), lanes, [True] * len(lanes), tokens)
        assert np.array_equal(kept.decode(rows), callback.decode(rows))
    assert kept.memory_bytes() == callback.memory_bytes()
    kept.close()
    callback.close()


def test_a_tensor_that_is_not_kept_is_noticed_and_read_by_the_callback(folder, monkeypatch):
    # The norm behind the last layer is computed into the memory of what it reads.
    monkeypatch.setattr(native, "set_output", lambda tensor: None)
    engine = load(folder)
    assert type(engine._tap) is Tap
    engine.close()


def test_a_graph_without_the_tensor_is_read_by_the_callback(folder, monkeypatch):
    monkeypatch.setattr(native, "graph_tensor", lambda graph, name: None)
    engine = load(folder)
    assert type(engine._tap) is Tap
    assert engine.decode(Rows([0], [0], [True], [5])).shape == (1, engine.width)
    engine.close()


def test_a_graph_that_loses_the_tensor_later_is_an_error_and_not_an_answer(folder, monkeypatch):
    engine = load(folder)
    monkeypatch.setattr(native, "graph_tensor", lambda graph, name: None)
    with pytest.raises(StageError) as refusal:
        engine.decode(Rows([0, 1], [0, 0], [True, True], [5, 6]))
    assert refusal.value.reason == "tap_missed"
    engine.close()


def test_a_slice_whose_input_is_replaced_keeps_the_callback(tmp_path):
    engine = load(first_slice(tmp_path, [0, 2, 4], "gemma"))
    assert type(engine._tap) is Tap
    engine.close()


def test_a_slice_with_a_layer_behind_the_tap_keeps_the_callback(tmp_path):
    # Layer 1 alone has no window, and llama.cpp wants a layer that has.
    folder = first_slice(tmp_path, [0, 1, 2, 4], "gpt-oss")
    engine = SliceEngine.load(folder / "1.gguf", None, OPTIONS, first=False, last=False)
    assert type(engine._tap) is Tap
    engine.close()
    without = load(folder)
    assert type(without._tap) is KeptTap
    without.close()
