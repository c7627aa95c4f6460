"""The frozen snapshot that everybody reads: command line, console, API. Made by the mediator, never by a reader.

Times are seconds of the node's own monotonic clock turned into ages (`..._s`), sizes are bytes.
"""

from __future__ import annotations

import msgspec


class PeerStatus(msgspec.Struct, frozen=True):
    """Another member, seen from here."""

    node: str
    name: str
    state: str
    """linked | alive (by others' word) | connecting | lost | suspect | dead | left | conflict (its key was copied) |
    barred (it says that this node was revoked)"""
    addresses: tuple[str, ...] = ()
    memory_usable: int = 0
    age_s: float = 0.0
    """Since the last message of this peer."""
    rtt_ms: float | None = None
    """Of the last ping on the control link; null before the first."""
    error: str = ""
    """Why the last dial failed, if it is not linked."""
    role: str = ""
    """member | client; empty while nothing proves it."""
    path: str = ""
    """direct; empty without a link."""
    serves: tuple[str, ...] = ()
    """Models that it coordinates."""
    draining: bool = False
    """Takes no more work, because somebody asked for it (`meshnode drain`)."""


class StageStatus(msgspec.Struct, frozen=True):
    """One slice of a run."""

    stage: int
    node: str
    name: str
    first: int
    last: int
    """Layers [first, last)."""
    state: str
    """claimed | fetching | loading | ready | connected | failed"""
    done: int = 0
    total: int = 0
    """Progress within `state`: bytes for fetching, parts per thousand for loading."""
    weight_bytes: int = 0
    kv_bytes: int = 0


class DeploymentStatus(msgspec.Struct, frozen=True):
    """One model that was asked for."""

    deployment: str
    model: str
    state: str
    """waiting | planning | preparing | connecting | serving | failed"""
    term: int = 0
    run: str = ""
    context: int = 0
    lanes: int = 0
    kv_type: str = ""
    layers: int = 0
    coordinator: str = ""
    stages: tuple[StageStatus, ...] = ()
    note: str = ""
    """For people: the shortfall while waiting, the reason after a failure."""
    failures: int = 0
    phase: str = ""
    """While it is not serving yet, what its slowest stage does: claimed | fetching | loading | ready | connected."""
    percent: int = 0
    """Of that phase, over all stages."""


class HeadLoad(msgspec.Struct, frozen=True):
    """What the head of a run has to do now, and has done since it began."""

    lanes_busy: int
    queued: int
    paused: int
    in_flight: int
    """Microbatches on their way through the stages."""
    cells_reserved: int
    cells_kept: int
    """Of ended requests, for those that begin like them."""
    prompt_tokens: int
    cached_tokens: int
    """Of prompts: not computed, because a lane held them. `prompt_tokens` are those that were."""
    generated_tokens: int
    bubble: float | None = None
    """Mean share of stages without a microbatch while a lane was busy; null before that was seen."""


class StageLoad(msgspec.Struct, frozen=True):
    """What a stage process of this node did in the last interval that was looked at, 10 s."""

    busy: float
    """Share of the time in which it computed."""
    rows_per_microbatch: float | None = None
    """Null where there was none."""


class NodeStatus(msgspec.Struct, frozen=True):
    """This node and what it knows."""

    node: str
    name: str
    mesh: str
    role: str
    issuer: bool
    version: str
    mesh_addresses: tuple[str, ...]
    api_url: str
    memory_usable: int
    uptime_s: float
    peers: tuple[PeerStatus, ...] = ()
    deployments: tuple[DeploymentStatus, ...] = ()
    opening: dict[str, tuple[int, int]] = {}
    """Models of this node that are being hashed: bytes done, bytes in all."""
    problems: tuple[str, ...] = ()
    """Models of this node that could not be loaded, and why; the latest last."""
    draining: bool = False
    """As of a peer."""
    unhealthy: tuple[str, ...] = ()
    """What is wrong with this node although it answers, for people; empty: nothing that it knows of."""
    stages: dict[str, int] = {}
    """Stage processes of this node: `<run>/<stage>` -> process id."""
    heads: dict[str, HeadLoad] = {}
    """Heads of this node by run."""
    loads: dict[str, StageLoad] = {}
    """As `stages`; of those that were looked at twice."""
    counters: dict[str, int] = {}
    warnings: tuple[str, ...] = ()
    """For people: what does not stop this node today, and will cost somebody something later."""
