"""kill -9 while a slice is being fetched: what was verified or marked is not fetched again."""

import subprocess
import sys
from pathlib import Path

import pytest
import trio

from meshnode.io.artifacts import ArtifactStore
from meshnode.io.artifacts.records import read_record
from tests.io.artifacts.rig import Model, PlainLayouts, expected
from tests.io.artifacts.test_store import Peer, weights

CHILD = """
import sys, pathlib, trio
from meshnode.io.artifacts import ArtifactStore, part
from tests.io.artifacts.rig import Model, PlainLayouts
from tests.io.artifacts.test_store import Peer

class Stalling(Peer):
    async def fetch(self, digest, artifact, offset, length, sink):
        async def slow(data):
            await sink(data)
            if self.sent > int(sys.argv[2]):
                print("stalled", flush=True)
                await trio.sleep_forever()
        await super().fetch(digest, artifact, offset, length, slow)

part.MARK_BYTES = 1_000_000
model = Model()
trio.run(ArtifactStore(pathlib.Path(sys.argv[1]), PlainLayouts()).prepare, model.digest, 1, 5, [Stalling(model)])
"""


@pytest.mark.parametrize("stop_at", [300_000, 7_300_000, 19_999_000])
def test_kill_9_costs_at_most_one_mark(tmp_path, stop_at):
    model = Model()
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(stop_at)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as child:
        said = child.stdout.readline()
        child.kill()
    assert said == b"stalled\n"
    ready = trio.run(ArtifactStore(tmp_path, PlainLayouts()).prepare, model.digest, 1, 5, [Peer(model)])
    left = weights(model, 1, 5) - stop_at
    # the mark, one piece of 100 kB and the 4 kB of metadata
    assert left - 110_000 <= ready.fetched_bytes <= left + 1_110_000
    layout = PlainLayouts().slice(ready.metadata, model.manifest, 1, 5)
    assert ready.path.read_bytes() == expected(model, layout)
    assert not ready.path.with_name(ready.path.name + ".part").exists()
    assert read_record(ready.path).size == layout.size
