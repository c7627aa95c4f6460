"""Meshes that several tests share, because starting three nodes takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.nodes import RealMesh, until

# Below the whole demonstration model with its buffers and below a half of it, above a third.
MEMORY = ("--memory", "153MB")


def three_nodes(folder: Path) -> RealMesh:
    """The demonstration model over three nodes, ready to answer."""
    mesh = RealMesh(folder)
    try:
        mesh.found("one", "--context", "2048", *MEMORY)
        mesh.join("two", *MEMORY)
        mesh.join("three", *MEMORY)
        until("the model is served by three stages", mesh.nodes[0].serving)
        for node in mesh.nodes:
            until(f"{node.name} lists it", lambda node=node: node.ready())
    except BaseException:
        mesh.close()
        raise
    return mesh


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealMesh]:
    """Three nodes that one test module shares."""
    made = three_nodes(tmp_path_factory.mktemp("mesh"))
    yield made
    made.close()
