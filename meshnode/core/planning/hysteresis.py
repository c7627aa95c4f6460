"""When a better plan is worth moving what runs: not for every measurement that wobbles.

Lost participants and a user's wish need no gain; everything else needs one that is large and lasts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from meshnode.core.planning.context import COMFORTABLE_CONTEXT
from meshnode.core.planning.plan import Plan

GAIN_PERCENT = 20
"""A move costs loading, and its first answers are slow: predictions are good to 15 % (COORDINATION), so less may be
none at all."""

LASTING_S = 30.0
"""A gain must hold so long: a busy minute of one machine, or a slow measurement, passes."""


class Cause(Enum):
    """Why to plan again."""

    BETTER = "better"
    """Something changed that may allow a better plan."""
    LOST = "lost"
    """A participant is gone or leaving: what runs cannot go on."""
    ASKED = "asked"
    """A user wants it."""


@dataclass(frozen=True)
class Standing:
    """Whether to replace what runs, and since when there has been a gain."""

    replace: bool
    since: float | None = None


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


def judge(standing: Standing, cause: Cause, gains: bool, now: float) -> Standing:
    """The standing at `now`, where `gains` says whether the newest plan is `better` than what runs."""
    if cause is not Cause.BETTER:
        return Standing(True, standing.since)
    if not gains:
        return Standing(False)
    since = now if standing.since is None else standing.since
    return Standing(now - since >= LASTING_S, since)
