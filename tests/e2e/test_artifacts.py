"""A joiner has no model file: it fetches its slice once, and never again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from meshnode.demo import MODEL
from tests.e2e.conftest import MEMORY, three_nodes
from tests.e2e.nodes import RealNode, until

pytestmark = pytest.mark.e2e


def files(node: RealNode) -> dict[str, tuple[int, int, int]]:
    """Identity, time of change and size of every GGUF below the data directory."""
    found = {path: path.stat() for path in node.data.rglob("*.gguf")}
    return {str(path): (stat.st_ino, stat.st_mtime_ns, stat.st_size) for path, stat in found.items()}


def test_a_killed_joiner_comes_back_and_moves_no_weight_byte(tmp_path: Path) -> None:
    mesh = three_nodes(tmp_path)
    try:
        first, joiner = mesh.nodes[0], mesh.nodes[1]
        before = files(joiner)
        slices = [path for path in before if "slice-" in path]
        assert len(slices) == 1
        assert Path(slices[0]).stat().st_size < MODEL.stat().st_size // 2
        joiner.stop(signal.SIGKILL)
        until("the run has ended", lambda: first.serving() is None)
        joiner.start("join", *MEMORY)
        until("the model is served again", first.serving)
        assert files(joiner) == before
        assert first.client().models.list().data
    finally:
        mesh.close()
