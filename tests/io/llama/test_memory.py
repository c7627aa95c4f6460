"""What a stage takes after 100 tokens: its slice, its cache, and no more than the reserve that planning counts."""

import json
import subprocess
import sys

import pytest

from meshnode.core.planning.context import STAGE_RESERVE_BYTES
from meshnode.io.llama.gguf_file import open_model
from meshnode.io.llama.manifest import build_manifest, open_artifacts
from meshnode.io.llama.slicing import layout_embedding, layout_slice, write_slice
from tests.factory import build

STAGE = """
import json, sys
from pathlib import Path
import numpy as np
from meshnode.io.llama.engine import EngineOptions, Rows, SliceEngine
path, embedding, first = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "first"
options = EngineOptions(4096, 4, 128, "q8_0", True, 1)
engine = SliceEngine.load(path, embedding if first else None, options, first=first, last=not first)
for position in range(100):
    activations = None if first else np.ones((1, engine.width), np.float32)
    engine.decode(Rows((position,), (0,), (True,), (0,) if first else None, activations))
lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
resident = sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssFile")) * 1024
print(json.dumps([resident, engine.memory_bytes()["kv"]]))
"""


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from /proc")
@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_stage_with_a_vocabulary_of_150000_stays_within_its_slice_its_cache_and_the_reserve(kind, tmp_path):
    path = build(tmp_path / "m.gguf", layers=2, embd=128, ff=256, vocabulary=150_000, kind=kind)
    model = open_model(path)
    manifest = build_manifest(model)
    with open_artifacts(model, manifest) as artifacts:
        write_slice(layout_embedding(model.keys, manifest), artifacts.read, tmp_path / "embedding.gguf")
        for name, first, last in (("first", 0, 1), ("last", 1, 2)):
            layout = layout_slice(model.keys, manifest, first, last)
            write_slice(layout, artifacts.read, tmp_path / f"{name}.gguf")
            command = [sys.executable, "-c", STAGE, tmp_path / f"{name}.gguf", tmp_path / "embedding.gguf", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            resident, cache = json.loads(done.stdout)
            assert resident <= layout.bytes_copied + cache + STAGE_RESERVE_BYTES, name
