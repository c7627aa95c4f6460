"""Snapshots for the command line's tests, built in one place (R103)."""

from __future__ import annotations

from typing import Any

import msgspec

from meshnode.core.node.status import DeploymentStatus, NodeStatus, PeerStatus, StageStatus

NODE = NodeStatus(
    node="a" * 52,
    name="desk",
    mesh="m" * 52,
    role="member",
    issuer=True,
    version="0.1.0",
    mesh_addresses=("192.0.2.1:8420",),
    api_url="http://127.0.0.1:8421",
    memory_usable=6_000_000_000,
    uptime_s=12.0,
)
PEER = PeerStatus(node="b" * 52, name="attic", state="linked", addresses=("192.0.2.2:8420",), rtt_ms=0.4)
STAGES = (
    StageStatus(stage=0, node="a" * 52, name="desk", first=0, last=6, state="ready", weight_bytes=10**9),
    StageStatus(stage=1, node="b" * 52, name="attic", first=6, last=12, state="fetching", done=5, total=10**9),
)
DEPLOYMENT = DeploymentStatus(
    deployment="d1", model="tiny", state="preparing", run="r1", context=4096, lanes=4, kv_type="q8_0", stages=STAGES
)


def with_stage(deployment: DeploymentStatus, **changes: Any) -> DeploymentStatus:
    """The same deployment, its last stage changed."""
    last = msgspec.structs.replace(deployment.stages[-1], **changes)
    return msgspec.structs.replace(deployment, stages=(*deployment.stages[:-1], last))


def node(*deployments: DeploymentStatus, peers: tuple[PeerStatus, ...] = ()) -> NodeStatus:
    """A node with these deployments and peers."""
    return msgspec.structs.replace(NODE, deployments=deployments, peers=peers)
