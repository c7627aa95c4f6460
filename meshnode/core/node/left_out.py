"""What the mediator hears in the place of an effect that was left out, because a write that it rests on had failed.

Invariant: no run goes on at its coordinator whose orders, head or stages were left out: it ends with the reason `disk`
and is followed by a new plan, instead of looking as if it served.
"""

from __future__ import annotations

from meshnode.core.node import effects as do
from meshnode.core.node.events import HeadFailed, StageReported
from meshnode.wire.messages import Claim, Commit, Connect, Failed, Prepare

REASON = "disk"
MESSAGE = "the data directory of the machine that coordinates it cannot be written"
AT_STAGE = "its data directory cannot be written"


def in_place_of(effect: do.Action) -> HeadFailed | StageReported | None:
    """None: who waits for it has a bound of its own (an answer, a drain), or nobody does."""
    match effect:
        case do.OpenHead():
            return HeadFailed(effect.claim.fence, MESSAGE, REASON)
        case do.ServeHead():
            return HeadFailed(effect.fence, MESSAGE, REASON)
        case do.Send(message=Claim() | Prepare() | Connect() | Commit() as order):
            return HeadFailed(order.fence, MESSAGE, REASON)
        case do.PrepareStage():
            return StageReported(Failed(effect.order.fence, effect.order.stage, REASON, AT_STAGE))
        case _:
            return None
