"""Claims for tests: small, valid, and what a participant may say about them."""

from __future__ import annotations

from meshnode.identity.ids import NodeId
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.messages import Claim, ClaimedStage, Hop, Prepare, RunOptions
from tests.core.node.mesh import name_to_id

A, B, C = (name_to_id(name) for name in "abc")
OPTIONS = RunOptions(context=256, lanes=4, chunk=128, kv_type="q8_0", flash_attention=True)


def fence(term: int = 1, run: int = 1) -> Fence:
    return Fence(Term(term), RunId(f"{run:016x}"))


def claim(
    nodes: tuple[NodeId, ...] = (A, B),
    coordinator: NodeId = A,
    term: int = 1,
    run: int = 1,
    deployment: str = "d1",
    size: int = 10,
) -> Claim:
    """Two layers a stage, `size` bytes reserved by each."""
    stages = tuple(ClaimedStage(i, node, 2 * i, 2 * i + 2, size, 0, size) for i, node in enumerate(nodes))
    return Claim(
        fence=fence(term, run),
        deployment=deployment,
        model="model",
        manifest_digest="ab" * 32,
        plan_digest="cd" * 32,
        coordinator=coordinator,
        layers=2 * len(nodes),
        options=OPTIONS,
        stages=stages,
    )


def prepare(of: Claim, stage: int) -> Prepare:
    """The order that follows from a claim."""
    return Prepare(
        fence=of.fence,
        deployment=of.deployment,
        manifest_digest=of.manifest_digest,
        source=of.coordinator,
        stage=stage,
        stages=len(of.stages),
        first=of.stages[stage].first,
        last=of.stages[stage].last,
        layers=of.layers,
        options=of.options,
        upstream=Hop(bytes(16), "up", of.coordinator),
        downstream=Hop(bytes(16), "down", of.coordinator),
    )
