"""When a better plan is worth moving what runs: not for every measurement that wobbles.

Lost participants and a user's wish need no gain; everything else needs one that is large and lasts.
"""

from __future__ import annotations

from meshnode.core.planning.context import COMFORTABLE_CONTEXT
from meshnode.core.planning.plan import Plan

GAIN_PERCENT = 20
"""A move costs loading, and its first answers are slow: predictions are good to 15 % (COORDINATION), so less may be
none at all."""

LASTING_S = 30.0
"""A gain must hold so long: a busy minute of one machine, or a slow measurement, passes."""


def better(old: Plan, new: Plan) -> bool:
    """Whether `new` gains enough over `old`, if that lasts. Both predicted from the same inventory (`predict`).

    A gain is a token in less than 100 / 120 of the time with no less context than a chat needs, or, for what serves
    with less than that, a fifth more context.
    """
    if old.prediction is None or new.prediction is None or new.digest == old.digest:
        return False
    usual = min(old.context, COMFORTABLE_CONTEXT)
    if new.context < usual or new.lanes < old.lanes:
        return False
    roomier = usual < COMFORTABLE_CONTEXT and new.context * 100 >= usual * (100 + GAIN_PERCENT)
    return roomier or new.prediction.token_us * (100 + GAIN_PERCENT) < old.prediction.token_us * 100
