"""The look-up gives the numbers that the file holds, for every type it is stored in."""

import gguf
import numpy as np
import pytest

from meshnode.errors import ModelError, StageError
from meshnode.io.llama.batch import RowBuffer
from meshnode.io.llama.embedding import EmbeddingTable
from tests.factory import build, quantize

pytestmark = pytest.mark.native


def table_of(path):
    tensor = next(item for item in gguf.GGUFReader(path).tensors if item.name == "token_embd.weight")
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0", "q4_k_m", "q6_k"])
def test_rows_are_those_of_the_file(kind, tmp_path):
    path = build(
        tmp_path / "m.gguf", layers=1, embd=256, kind=kind if kind in ("f32", "f16", "q8_0", "q4_0") else "f32"
    )
    if kind in ("q4_k_m", "q6_k"):
        path = quantize(path, tmp_path / "q.gguf", kind)
    table = EmbeddingTable(path)
    rows = RowBuffer(4, 256)
    table.look_up([0, 511, 7], rows)
    assert np.array_equal(rows.array[:3], table_of(path)[[0, 511, 7]])
    assert not rows.array[3].any()
    table.close()


@pytest.mark.parametrize("token", [-1, 512, 1 << 30])
def test_a_token_outside_the_vocabulary_is_refused(token, tmp_path):
    table = EmbeddingTable(build(tmp_path / "m.gguf", layers=1))
    with pytest.raises(StageError):
        table.look_up([token], RowBuffer(1, 64))
    table.close()


def test_a_file_without_the_table_is_refused(tmp_path):
    path = build(tmp_path / "m.gguf", layers=1)
    path.write_bytes(path.read_bytes().replace(b"token_embd.weight", b"token_embt.weight"))
    with pytest.raises(ModelError):
        EmbeddingTable(path)
