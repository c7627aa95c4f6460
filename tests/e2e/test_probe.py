"""The probe with real stages: the first good run is remembered, and a run that contradicts it is never listed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from meshnode.demo import EXPECTED_ANSWER, MODEL
from tests.e2e.harm import answers
from tests.e2e.nodes import RealMesh, RealNode, until
from tests.e2e.test_models import listed

pytestmark = pytest.mark.e2e

ROOMY = ("--context", "2048", "--memory", "500MB")


def test_what_the_first_run_answered_is_asked_of_the_next(tmp_path: Path) -> None:
    mesh = RealMesh(tmp_path)
    try:
        node = mesh.found("one", *ROOMY)
        until("the model is served", node.serving)
        (record,) = node.data.glob("cache/*/probe-q8_0.json")
        kept = record.read_bytes()
        assert node.stop() == 0
        node.start("serve", str(MODEL), *ROOMY)
        node.await_running()
        until("it is served again", node.serving)
        assert record.read_bytes() == kept
        assert answers(node) == EXPECTED_ANSWER
        assert node.stop() == 0

        wrong = msgspec.json.decode(kept)
        wrong["answered"] = [token + 1 for token in wrong["answered"]]
        record.write_bytes(msgspec.json.encode(wrong))
        node.start("serve", str(MODEL), *ROOMY)
        node.await_running()
        told = until("the probe failed", lambda: "the probe failed" in (found := note(node)) and found)
        for answered in (wrong["answered"], msgspec.json.decode(kept)["answered"]):
            assert str(answered)[1:-1] in told
        assert listed(node) == set()
        record.unlink()
        until("without the record it is served again", node.serving)
        assert answers(node) == EXPECTED_ANSWER
    finally:
        mesh.close()


def note(node: RealNode) -> str:
    """Why nothing serves."""
    found = node.deployment()
    return "" if found is None else str(found["note"])
