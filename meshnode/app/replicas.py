"""Which of several pipelines of one model answers soonest: the same model here, elsewhere, or both.

A pipeline of S stages computes S tokens at a time, so a request among `busy` others gets a token in
token_us x max(S, busy + 1) / S; beyond its lanes they queue and wait in the same proportion. How busy another node's
head is comes with each of its answers and counts for a moment; what this node itself asks of it counts always.

Invariant: a number that a peer tells decides where this node's own requests go, and nothing else.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec

from meshnode.identity.ids import NodeId

HEADER: Final = "x-meshnode-load"
"""On an answer between nodes: a JSON map of model -> Load of the heads there. Clients never see it."""
FRESH_S: Final = 15.0
"""A load that was told longer ago is forgotten: by then other requests came and went."""


class Load(msgspec.Struct, frozen=True, array_like=True):
    """What a head has to do."""

    stages: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    busy: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 0
    """Requests in lanes and in the queue."""
    token_us: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 0
    """Predicted for one stream; 0: unknown."""

    def wait_us(self, usual_us: int) -> int:
        """For each token of one more request; an unknown pipeline is as fast as `usual_us`."""
        return (self.token_us or usual_us) * max(self.stages, self.busy + 1) // self.stages


@dataclass
class Replicas:
    """What is known of the heads elsewhere. `now` is a monotonic clock in seconds."""

    now: Callable[[], float]
    _told: dict[tuple[NodeId, str], tuple[float, Load]] = field(default_factory=dict)
    _own: Counter[tuple[NodeId, str]] = field(default_factory=Counter)

    def load(self, node: NodeId, model: str) -> Load:
        """As far as it is known: at least what this node asked for."""
        own = self._own[node, model]
        at, told = self._told.get((node, model), (float("-inf"), Load()))
        if self.now() - at > FRESH_S:
            return msgspec.structs.replace(told, busy=own)
        return msgspec.structs.replace(told, busy=max(told.busy, own))

    def ranked(self, nodes: Iterable[NodeId], model: str, local: Load | None = None) -> list[NodeId | None]:
        """Who serves `model`, the shortest expected wait first; None is this node, which has `local` to do.

        One that told nothing yet counts as fast as the fastest that did: so it is asked, and tells.
        """
        loads: dict[NodeId | None, Load] = {node: self.load(node, model) for node in nodes}
        if local is not None:
            loads[None] = local
        usual = min((load.token_us for load in loads.values() if load.token_us), default=1)
        # Between equals this node, which needs no way, and then the lower id.
        return sorted(loads, key=lambda node: (loads[node].wait_us(usual), node or ""))

    @contextmanager
    def asking(self, node: NodeId, model: str) -> Iterator[None]:
        """A request of this node is under way there."""
        self._own[node, model] += 1
        try:
            yield
        finally:
            self._own[node, model] -= 1
            if not self._own[node, model]:
                del self._own[node, model]

    def hear(self, node: NodeId, model: str, headers: tuple[tuple[str, str], ...]) -> None:
        """Take the load from the headers of an answer; one that cannot be read is left out."""
        text = next((value for name, value in headers if name == HEADER), "")
        try:
            told = msgspec.json.decode(text, type=dict[str, Load])
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return
        # Only of the model that was asked for: memory for what a peer says is bounded by what this node asks.
        if model in told:
            # The answered request itself is among them, and is counted here.
            self._told[node, model] = (self.now(), told[model])


def header_of(loads: dict[str, Load]) -> tuple[str, str]:
    """The header that tells `loads`: ASCII, whatever the models are called."""
    return HEADER, json.dumps({model: msgspec.structs.astuple(load) for model, load in loads.items()})
