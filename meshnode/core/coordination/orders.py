"""What a run asks of the mediator, in the order in which it must be done."""

from __future__ import annotations

from dataclasses import dataclass

from meshnode.identity.ids import NodeId
from meshnode.wire.fence import Fence
from meshnode.wire.messages import AnyMessage


@dataclass(frozen=True)
class Order:
    """Send `message` to `node` (which may be this node itself)."""

    node: NodeId
    message: AnyMessage


@dataclass(frozen=True)
class OpenHead:
    """Connect the head of this run to its first and last stage and probe it."""

    fence: Fence


@dataclass(frozen=True)
class ServeHead:
    """New requests go to this head from now on."""

    fence: Fence


@dataclass(frozen=True)
class DrainHead:
    """No new request goes to this head; those under way finish."""

    fence: Fence


@dataclass(frozen=True)
class CloseHead:
    """End the head of this run; whatever streams through it gets a typed error."""

    fence: Fence


@dataclass(frozen=True)
class Decide:
    """Write down that this run is committed, before anybody hears of it."""

    fence: Fence


@dataclass(frozen=True)
class FetchedAll:
    """Every slice of a run that takes another's place is there: that one may be ended."""

    fence: Fence


@dataclass(frozen=True)
class Drained:
    """Its streams had their time."""

    fence: Fence


@dataclass(frozen=True)
class Served:
    """Every participant has committed: the runs before this one are to be drained and fenced."""

    fence: Fence


@dataclass(frozen=True)
class Ended:
    """The run ended, or broke. `node`: the participant to blame, if one is; `promised`: the term it granted before."""

    fence: Fence
    reason: str
    message: str
    node: NodeId | None = None
    promised: int = 0
    served: bool = False
    """Whether it had come as far as serving."""
    room: int | None = None
    """Bytes that the participant said it has, where it refused for want of room."""


RunOrder = Order | OpenHead | ServeHead | DrainHead | CloseHead | Decide | FetchedAll | Drained | Served | Ended


@dataclass(frozen=True)
class Hops:
    """Tokens of a run: `tokens[k]` is the stream into stage k, the last one the return stream into the head."""

    tokens: tuple[bytes, ...]
    names: tuple[str, ...]
    """Certificate names: stages 0..n-1, then the head."""
