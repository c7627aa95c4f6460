"""A plan: which node runs which layers, in which order, with how much context."""

from __future__ import annotations

import hashlib

import msgspec

from meshnode.identity.ids import NodeId
from meshnode.wire.demand import DeploymentId

_UNBOUND = frozenset({"prediction", "replicas"})
"""Not part of what nodes agree on: a prediction moves with every measurement, a replica has a digest of its own."""


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


class StageTime(msgspec.Struct, frozen=True):
    """What one stage adds to a token, microseconds."""

    compute_us: int
    wire_us: int
    """The hop to it: from the head, or from the stage before."""
    chunk_us: int
    """Of a prefill chunk of `pace.CHUNK_ROWS` rows."""
    measured: bool
    """False: the node told no speed, one is assumed (`pace`)."""


class Single(msgspec.Struct, frozen=True):
    """The fastest node that could hold the whole model alone."""

    node: NodeId
    name: str
    token_us: int


class Prediction(msgspec.Struct, frozen=True):
    """Of one token at a conversation of `pace.REFERENCE_TOKENS`, microseconds. Says nothing about what is planned."""

    token_us: int
    """What a client waits: `compute_us + wire_us + return_us`."""
    compute_us: int
    wire_us: int
    """All hops, the one from the head to stage 0 included."""
    return_us: int
    """From the last stage back to the head."""
    stages: tuple[StageTime, ...]
    single: Single | None = None
    """To compare with; None where no node could."""

    @property
    def slowest_us(self) -> int:
        """Of the slowest stage: several streams at once get at most a token in this time."""
        return max(stage.compute_us for stage in self.stages)


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
    prediction: Prediction | None = None
    replicas: tuple[Plan, ...] = ()
    """Further pipelines of the same demand, on other nodes, where it asked for replicas."""

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, hex: equal on every machine that planned from the same input, and equal
        for equal placements however fast they were predicted to be."""
        bound = {name: getattr(self, name) for name in self.__struct_fields__ if name not in _UNBOUND}
        return hashlib.sha256(msgspec.msgpack.encode(bound)).hexdigest()

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """The nodes in pipeline order."""
        return tuple(stage.node for stage in self.stages)
