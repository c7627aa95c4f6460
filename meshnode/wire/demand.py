"""A demand: what shall be served, and how. Signed by who said it, and passed on unchanged (messages.DemandRecord).

Invariant: 0 and "" mean "choose for me"; of two versions of one deployment the higher (version, author) counts.
"""

from __future__ import annotations

from typing import NewType

import msgspec

from meshnode.identity.ids import NodeId

DeploymentId = NewType("DeploymentId", str)
"""Random, made by `serve` or `load`; outlives its runs."""

DEPLOYMENT_CHARACTERS = 16
"""8 random bytes in hexadecimal."""


class Demand(msgspec.Struct, frozen=True, omit_defaults=True):
    """One model that somebody asked for; the higher (version, author) wins."""

    deployment: DeploymentId
    version: int
    author: NodeId
    """Who said this version of it; the first one has the model file, and coordinates while it is there."""
    manifest_digest: str
    model: str
    """The name that clients use."""
    context: int = 0
    """Tokens in all lanes together; 0: as many as fit, at most what the model was trained for."""
    lanes: int = 0
    """Sequences at once; 0: 4, or fewer where the recurrent state of 4 does not fit."""
    kv_type: str = ""
    """f32 | f16 | q8_0 | q4_0; empty: the model's default (q8_0 where it can)."""
    pins: tuple[NodeId, ...] = ()
    """Only these nodes may take layers, by exact id; empty: any."""
    removed: bool = False
    excludes: tuple[NodeId, ...] = ()
    """These nodes take no layers, by exact id."""
    cuts: tuple[int, ...] = ()
    """Where to cut, exactly: the first layer of every stage but the first; empty: where it is fastest."""
    replicas: int = 0
    """Pipelines of this model, on nodes of their own each; 0: one."""
    created: int = 0
    """Unix seconds at which it was asked for or, with `removed`, given up: for people and for forgetting; decides
    nothing between two versions."""
