"""A plan: which node runs which layers, in which order, with how much context."""

from __future__ import annotations

import hashlib

import msgspec

from meshnode.core.planning.demand import DeploymentId
from meshnode.identity.ids import NodeId


class StagePlan(msgspec.Struct, frozen=True):
    """One slice [first, last) and the memory it takes on its node, in bytes."""

    node: NodeId
    name: str
    first: int
    last: int
    weight_bytes: int
    """Its layers and the tensors that every slice repeats."""
    kv_bytes: int
    """KV cache of its own layers for the whole context, all lanes together."""
    state_bytes: int
    """Recurrent state of its own layers, all lanes together."""
    embedding_bytes: int
    """Token embedding: first stage only."""
    output_bytes: int
    """Output norm and matrix: last stage only."""
    reserve_bytes: int
    """Compute buffers and the process itself."""
    usable_bytes: int
    """What the node offered: the total below never exceeds it."""
    threads: int = 0
    """Compute threads; 0: the node decides."""

    @property
    def total_bytes(self) -> int:
        """What the node's ledger books."""
        return (
            self.weight_bytes
            + self.kv_bytes
            + self.state_bytes
            + self.embedding_bytes
            + self.output_bytes
            + self.reserve_bytes
        )

    @property
    def layers(self) -> int:
        """How many layers the slice has."""
        return self.last - self.first


class Plan(msgspec.Struct, frozen=True):
    """The whole pipeline of one deployment."""

    deployment: DeploymentId
    demand_version: int
    manifest_digest: str
    model: str
    coordinator: NodeId
    stages: tuple[StagePlan, ...]
    """In pipeline order; contiguous, from layer 0 to the last."""
    context: int
    """Cells of the KV cache in all, shared by the lanes."""
    lanes: int
    kv_type: str
    flash_attention: bool

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, hex: equal on every machine that planned from the same input."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """The nodes in pipeline order."""
        return tuple(stage.node for stage in self.stages)
