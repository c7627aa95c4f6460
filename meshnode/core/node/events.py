"""What happened: facts that the shell hands to the mediator, named in the past tense."""

from __future__ import annotations

from dataclasses import dataclass

from meshnode.core.membership.announcement import Speed, Way
from meshnode.core.planning.footprint import ModelFootprint
from meshnode.core.planning.plan import Plan
from meshnode.core.planning.shortfall import Shortfall
from meshnode.identity.ids import NodeId
from meshnode.wire.demand import Demand
from meshnode.wire.fence import Fence
from meshnode.wire.messages import AnyMessage, Connected, Failed, Fetched, Progress, Ready, Revoke


@dataclass(frozen=True)
class PeerFound:
    """Where a member may be (from the invite, from disk, or heard of on this network)."""

    node: NodeId
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class LinkOpened:
    """A CONTROL link to `peer` is authenticated, whoever dialed it."""

    peer: NodeId


@dataclass(frozen=True)
class LinkClosed:
    """The link to `peer` ended, or a dial of it failed."""

    peer: NodeId
    reason: str
    barred: bool = False
    """The peer says that this node was revoked."""


@dataclass(frozen=True)
class Received:
    """A message arrived on the link to `peer`."""

    peer: NodeId
    message: AnyMessage


@dataclass(frozen=True)
class Revoked:
    """The issuer at this node signed a new revocation list."""

    record: Revoke


@dataclass(frozen=True)
class Demanded:
    """Somebody at this node asked for a model that this node has the bytes of."""

    demand: Demand
    footprint: ModelFootprint
    created: int
    """Unix seconds, for the models list."""


@dataclass(frozen=True)
class Withdrawn:
    """The model is no longer wanted, by anybody."""

    deployment: str
    created: int = 0
    """Unix seconds, for forgetting it one day."""


@dataclass(frozen=True)
class ModelOpened:
    """An `OpenModel` effect came back: this node can take requests for the model."""

    deployment: str
    footprint: ModelFootprint


@dataclass(frozen=True)
class ModelNotOpened:
    """An `OpenModel` effect came to nothing."""

    deployment: str
    message: str


@dataclass(frozen=True)
class Planned:
    """A `MakePlan` effect came back."""

    deployment: str
    serial: int
    outcome: Plan | Shortfall


@dataclass(frozen=True)
class PlanFailed:
    """A `MakePlan` effect could not be carried out: the options are impossible, or the planner has a bug."""

    deployment: str
    serial: int
    message: str


@dataclass(frozen=True)
class StageReported:
    """A stage process of this node said something."""

    report: Progress | Fetched | Ready | Connected | Failed


@dataclass(frozen=True)
class HeadOpened:
    """The head of a run of this node is connected and its probe went through every stage."""

    fence: Fence


@dataclass(frozen=True)
class HeadDrained:
    """Nothing streams any more through a head that was to drain."""

    fence: Fence


@dataclass(frozen=True)
class HeadFailed:
    """The head could not be opened, or lost its pipeline."""

    fence: Fence
    message: str
    reason: str = "stage_lost"
    """`probe_failed`, what a stage said, or that something of it is gone."""


@dataclass(frozen=True)
class CacheChanged:
    """Other slices than before lie on this node's disk."""

    cached: dict[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Measured:
    """All that is known of this node's speed and of the ways to it."""

    speeds: dict[str, Speed]
    ways: dict[NodeId, Way]


@dataclass(frozen=True)
class DrainWanted:
    """Somebody at this node wants `node` (this one or another) to take no more work, or to take it again."""

    node: NodeId
    draining: bool = True


@dataclass(frozen=True)
class AddressesChanged:
    """This machine has other addresses than before."""

    addresses: tuple[str, ...]


@dataclass(frozen=True)
class CertificateRenewed:
    """This node shows another certificate from now on."""


@dataclass(frozen=True)
class Stopping:
    """The user wants this node to leave."""


@dataclass(frozen=True)
class TimePassed:
    """The deadline that the mediator named was reached."""


Event = (
    PeerFound
    | LinkOpened
    | LinkClosed
    | Received
    | Revoked
    | Demanded
    | Withdrawn
    | ModelOpened
    | ModelNotOpened
    | Planned
    | PlanFailed
    | StageReported
    | HeadOpened
    | HeadDrained
    | HeadFailed
    | CacheChanged
    | Measured
    | DrainWanted
    | AddressesChanged
    | CertificateRenewed
    | Stopping
    | TimePassed
)
