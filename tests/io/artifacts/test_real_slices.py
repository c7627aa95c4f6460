"""Slices of real GGUF files through the cache are those that the slicing rules write from the file itself."""

import pytest

from meshnode.app.shelf import GgufLayouts
from meshnode.core.planning import Demand, Inventory, NodeInventory, Plan, make_plan
from meshnode.core.planning.context import STAGE_RESERVE_BYTES
from meshnode.io.artifacts import ArtifactStore, BulkClient, Library, ModelSource
from meshnode.io.llama.footprint import footprint_of
from meshnode.io.llama.gguf_file import open_model
from meshnode.io.llama.manifest import build_manifest, open_artifacts
from meshnode.io.llama.slicing import layout_embedding, layout_slice, write_slice
from meshnode.wire.manifest import manifest_digest
from tests import factory
from tests.io.artifacts.test_bulk import over_tls


@pytest.mark.parametrize("tied", [False, True])
async def test_what_a_plan_cuts_is_fetched_and_written_as_from_the_file(tmp_path, tied):
    model = open_model(factory.build(tmp_path / "model.gguf", layers=6, tied=tied))
    manifest = build_manifest(model)
    digest = manifest_digest(manifest)
    library = Library()
    store = ArtifactStore(tmp_path / "cache", GgufLayouts())
    footprint = footprint_of(model, digest)
    room = STAGE_RESERVE_BYTES + footprint.layers[0].weight_bytes * 3 + 400_000
    inventory = Inventory(tuple(NodeInventory(name, name, room) for name in "abc"))
    plan = make_plan(Demand("dep", 1, "a", digest, "model", context=256), footprint, inventory)
    assert isinstance(plan, Plan)
    assert len(plan.stages) > 1
    with open_artifacts(model, manifest) as artifacts:
        library.add(ModelSource(manifest, artifacts.read))
        async with over_tls(library) as stream:
            for stage in plan.stages:
                ready = await store.prepare(digest, stage.first, stage.last, [BulkClient(stream, "holder")])
                straight = tmp_path / "straight.gguf"
                write_slice(layout_slice(model.keys, manifest, stage.first, stage.last), artifacts.read, straight)
                assert ready.path.read_bytes() == straight.read_bytes()
                if stage.first == 0:
                    write_slice(layout_embedding(model.keys, manifest), artifacts.read, straight)
                    assert ready.embedding.read_bytes() == straight.read_bytes()
    # what the plan counts as weights is what travelled
    names = store.cached()[digest]
    assert sum(manifest.artifact(name).size for name in names) == manifest.bytes_total - manifest.artifacts[0].size
