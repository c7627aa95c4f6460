"""What this node says of itself to others: its state cut down to what one announcement may hold.

Invariant: whatever others make this node hold, its announcement fits: lists are cut here, never refused there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

from meshnode.core.membership.announcement import (
    BODY_BYTES,
    SPEEDS,
    WAYS,
    Body,
    Reserved,
    Served,
    Speed,
    Way,
)
from meshnode.core.node.deployments import Deployment
from meshnode.identity.ids import NodeId
from meshnode.wire.manifest import layer_name

SERVED = 8
"""Models with a head on one node; each takes 250 bytes at most of an announcement's 4096, unless another version of
this program named it."""
RESERVED = 8
"""Deployments named one by one; the rest is booked as one sum."""
CACHED = 4
"""Models of which cached slices are told."""
RANGES = 8
"""Slices told of one model."""

SIGNIFICANT = 2
"""Decimal digits of a measured number that are told: it moves by more than a per cent between two measurements, and a
plan must not follow that."""

ROOM = 64
"""For what is written into a body after it was made to fit: its number and the fingerprint of a certificate."""

LAYERS = 512
"""Layers believed of one range: as many as llama.cpp allows; a peer's number must not cost more."""

Ranges = tuple[tuple[int, int], ...]


def served(deployments: Iterable[Deployment]) -> tuple[Served, ...]:
    """The runs whose head is here."""
    found = []
    for deployment in deployments:
        run = deployment.current
        if run is not None and not deployment.leaving:
            claim, fence = run.claim, run.fence
            found.append(
                Served(
                    deployment=claim.deployment,
                    model=claim.model,
                    term=fence.term,
                    run=fence.run,
                    context=claim.options.context,
                    created=deployment.created,
                )
            )
    return tuple(found[:SERVED])


def reserved(held: Mapping[str, int]) -> tuple[Reserved, ...]:
    """Memory by deployment, the largest first; what does not fit is one sum under no name."""
    ranked = sorted(held.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(size for _, size in ranked[RESERVED:])
    named = tuple(Reserved(name, size) for name, size in ranked[:RESERVED])
    return (*named, Reserved("", rest)) if rest else named


def cached(slices: Mapping[str, Ranges]) -> dict[str, Ranges]:
    """The largest slices of the models with most layers here."""
    ranked = sorted(slices.items(), key=lambda item: (-sum(b - a for a, b in item[1]), item[0]))
    return {digest: ranges[:RANGES] for digest, ranges in ranked[:CACHED]}


def artifacts(slices: Mapping[str, Ranges]) -> dict[str, tuple[str, ...]]:
    """Names of the cached layers, as the planner counts them."""
    found = {}
    for digest, ranges in slices.items():
        layers = (layer for first, last in ranges[:RANGES] for layer in range(first, min(last, LAYERS)))
        found[digest] = tuple(layer_name(layer) for layer in layers)
    return found


def speeds(measured: Mapping[str, Speed]) -> dict[str, Speed]:
    """Speeds by kind of weights, in figures that stay."""
    return {
        kind: Speed(*(rounded(figure) for figure in msgspec.structs.astuple(speed)))
        for kind, speed in sorted(measured.items())[:SPEEDS]
    }


def ways(measured: Mapping[NodeId, Way]) -> dict[NodeId, Way]:
    """The ways from the nearest peers, in figures that stay."""
    ranked = sorted(measured.items(), key=lambda item: (item[1].rtt_us, item[0]))[:WAYS]
    return {node: Way(rounded(way.rtt_us), rounded(way.bytes_per_s)) for node, way in ranked}


def rounded(value: int) -> int:
    """`value` with its first SIGNIFICANT digits."""
    grain: int = 10 ** max(0, len(str(value)) - SIGNIFICANT)
    return (value + grain // 2) // grain * grain


def fitting(body: Body) -> Body:
    """`body` within an announcement's limit, cut from the ends of its lists: first what only makes plans better (ways,
    cached slices, speeds), then single sums of memory, then models, which clients of other nodes miss, and last what
    keeps two nodes from caring for one deployment. Names and addresses alone always fit."""
    for shorter in _CUTS:
        while len(msgspec.msgpack.encode(body)) > BODY_BYTES - ROOM and (cut := shorter(body)) is not None:
            body = cut
    return body


def _without(field: str) -> Callable[[Body], Body | None]:
    """Cuts the last entry of a list or map; None when it has none."""

    def shorter(body: Body) -> Body | None:
        held: tuple[object, ...] | dict[object, object] = getattr(body, field)
        left = dict(list(held.items())[:-1]) if isinstance(held, dict) else held[:-1]
        return msgspec.structs.replace(body, **{field: left}) if held else None

    return shorter


def _summed(body: Body) -> Body | None:
    """Tells all reserved memory as one sum: it must not look free."""
    if len(body.reserved) < 2:
        return None
    return msgspec.structs.replace(body, reserved=(Reserved("", sum(held.bytes for held in body.reserved)),))


_CUTS = (
    *(_without(field) for field in ("ways", "cached", "speeds")),
    _summed,
    *(_without(field) for field in ("served", "coordinates")),
)
