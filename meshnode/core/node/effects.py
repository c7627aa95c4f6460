"""What to do: orders of the mediator to the shell, in the order in which they must be done (Persist before Send)."""

from __future__ import annotations

from dataclasses import dataclass

from meshnode.core.coordination.orders import Hops
from meshnode.core.planning.footprint import ModelFootprint
from meshnode.core.planning.inventory import Inventory
from meshnode.identity.ids import NodeId
from meshnode.wire.demand import Demand
from meshnode.wire.fence import Fence
from meshnode.wire.messages import AnyMessage, Claim, Prepare


@dataclass(frozen=True)
class Dial:
    """Open a CONTROL link; answer with LinkOpened or LinkClosed."""

    node: NodeId
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Send:
    """Put a message on the link to `peer`; dropped when there is none."""

    peer: NodeId
    message: AnyMessage


@dataclass(frozen=True)
class CloseLink:
    """End the link to `peer`."""

    peer: NodeId
    reason: str


@dataclass(frozen=True)
class Persist:
    """Write the ledger durably before anything that follows in this list."""

    ledger: bytes


@dataclass(frozen=True)
class KeepRevocations:
    """Write the revocation lists durably before anything that follows in this list."""

    lists: bytes


@dataclass(frozen=True)
class KeepDemands:
    """Write the demands durably before anything that follows in this list."""

    demands: bytes


@dataclass(frozen=True)
class OpenModel:
    """Open what a head of this model needs, from this node's disk; answer with ModelOpened or ModelNotOpened."""

    demand: Demand


@dataclass(frozen=True)
class MakePlan:
    """Plan off the loop; answer with Planned and the same serial."""

    deployment: str
    serial: int
    demand: Demand
    footprint: ModelFootprint
    inventory: Inventory


@dataclass(frozen=True)
class PrepareStage:
    """Fetch what is missing, start the stage process, load it, or only fetch where the order says `hold`; a kept stage
    is given its new place instead. Answer with StageReported."""

    order: Prepare
    reserved_bytes: int
    """What the ledger booked for it: files that are larger are not loaded, whatever the coordinator said of them."""


@dataclass(frozen=True)
class ConnectStages:
    """Dial the downstream of every stage of this run on this node; answer with StageReported for each."""

    fence: Fence


@dataclass(frozen=True)
class Kept:
    """A loaded stage that becomes stage `stage` of the run `fence`."""

    before: int
    fence: Fence
    stage: int


@dataclass(frozen=True)
class StopStages:
    """End every stage process of this run on this node, but those that another run keeps."""

    fence: Fence
    kept: tuple[Kept, ...] = ()


@dataclass(frozen=True)
class RenewStages:
    """The lease of this run begins anew: its stages may go on for LEASE_S from now."""

    fence: Fence


@dataclass(frozen=True)
class OpenHead:
    """Connect the head of `claim` and probe it; answer with HeadOpened or HeadFailed. No request goes to it yet."""

    claim: Claim
    hops: Hops
    created: int


@dataclass(frozen=True)
class ServeHead:
    """Requests for the model go to the head of this run from now on."""

    fence: Fence


@dataclass(frozen=True)
class DrainHead:
    """No new request goes to this head; answer with HeadDrained when the last one under way has ended."""

    fence: Fence


@dataclass(frozen=True)
class CloseHead:
    """End the head of this run."""

    fence: Fence


@dataclass(frozen=True)
class Trace:
    """One line for the log: what was decided, with its fence. Never a prompt, key or token."""

    message: str


Write = Persist | KeepRevocations | KeepDemands
"""Effects that are durable before what rests on them is begun."""

Resting = Send | PrepareStage | ConnectStages | OpenHead | ServeHead | DrainHead
"""What rests on the writes before it in the list, and is left out behind one that failed: what others hear, and what
starts or hands over on the strength of a grant or a decision."""

Standing = Dial | CloseLink | OpenModel | MakePlan | StopStages | RenewStages | CloseHead | Trace
"""What happens behind a failed write all the same, because it frees, ends, dials, plans or tells a person: the mediator
has booked it, and nobody would do it later."""

Action = Resting | Standing
"""All that is no write."""

Effect = Write | Action
