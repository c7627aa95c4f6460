"""What this node knows of its own speed and of the ways to it: measured at the start, corrected while it serves.

    speed  a child process times llama.cpp once; kept in the data directory under what the machine is
           -> while stages run, what they take replaces it
    ways   a few round trips and a short transfer from each linked peer, once, and again from time to time

Invariant: nothing here computes on the event loop, and a node that cannot be measured works all the same.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec
import trio

from meshnode.app.probing import Probing
from meshnode.app.speed_main import KINDS, MachineSpeed, SpeedRequest
from meshnode.app.stages import Stages
from meshnode.core.membership.announcement import WAYS, Speed, Way
from meshnode.core.node.events import Event, Measured
from meshnode.core.node.mediator import Mediator
from meshnode.core.node.status import StageLoad
from meshnode.errors import MeshError
from meshnode.identity.ids import NodeId
from meshnode.io.disk.atomic import write_atomic
from meshnode.io.llama.footprint import read_footprint
from meshnode.io.stage.spawn import ChildProcess, native_environment
from meshnode.wire.stage_protocol import Statistics

log = logging.getLogger("meshnode.measuring")

SPEED_FILE: Final = "speed.json"
SPEED_BYTES: Final = 16 * 1024
"""Of that file: three kinds take 300."""
FORMAT: Final = 1
"""Grows when what is measured changes."""
KEPT_S: Final = 7 * 86400.0
"""Memory is replaced, a laptop is plugged in: a week later it is measured again."""
MEASURE_S: Final = 180.0
"""For the child: 10 s on an idle machine, ten times that where it gets a tenth of a core."""
WEIGHTS_BYTES: Final = 128_000_000
"""Of one timed model: more than the last-level cache of desktop processors (96 MB at most), and read in a moment."""
WEIGHTS_SHARE: Final = 8
"""At most this part of what the node offers."""
LOOK_S: Final = 10.0
"""Between two looks at what stages took, and at which peers are new: announcements go out each 60 s."""
WAY_S: Final = 1800.0
"""Between two measurements of one way: a network changes seldom, and a transfer takes room from activations."""
FEW: Final = 64
"""Steps of one row below which a stage's mean says little: it is one over the last ten or so."""
WEIGHT: Final = 0.2
"""Of what stages took in the new figure: a minute of looks follows a change of the machine's load."""
_MODULE: Final = "meshnode.app.speed_main"


class _Kept(msgspec.Struct, frozen=True):
    """The file."""

    machine: str
    at: float
    """Unix seconds."""
    speeds: dict[str, Speed]


@dataclass(frozen=True)
class Machine:
    """What is measured: a stage's `threads`, within `memory` bytes, with files in `folder`."""

    threads: int
    memory: int
    folder: Path

    @property
    def identity(self) -> str:
        """Equal as long as the same figures can be expected."""
        facts = (FORMAT, _processor(), os.cpu_count(), self.threads, version("llama-cpp-python"))
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


async def machine_speed(
    machine: Machine, kinds: tuple[str, ...] = tuple(KINDS), started: Callable[[int], None] = lambda pid: None
) -> dict[str, Speed]:
    """Measure now, in a child process, whose id `started` gets before it begins. Raises StageLost."""
    size = min(WEIGHTS_BYTES, machine.memory // WEIGHTS_SHARE)
    request = SpeedRequest(machine.threads, size, str(machine.folder), kinds)
    answer = b""
    async with trio.open_nursery() as nursery:
        environment = native_environment(machine.threads)
        child = await ChildProcess.start(nursery, "the measuring process", _MODULE, environment)
        started(child.pid)
        try:
            with trio.move_on_after(MEASURE_S):
                await child.connection.send(msgspec.json.encode(request) + b"\n")
                while not answer.endswith(b"\n") and (part := await child.connection.recv(SPEED_BYTES)):
                    answer += part
                await child.ended.wait()  # it ends by itself, and its last words say why when there is no answer
        except OSError:
            answer = b""
        await child.aclose()
        lost = child.lost()
        nursery.cancel_scope.cancel()
    if not answer.endswith(b"\n"):
        raise lost
    return msgspec.json.decode(answer, type=MachineSpeed).speeds


@dataclass(frozen=True)
class _Slice:
    """What a running stage computes with."""

    kind: str
    weight_bytes: int
    layers: int

    def correct(self, speed: Speed, decode_us: int) -> Speed:
        """`speed` moved towards what a decode of one row took here."""
        took_us = max(decode_us - speed.layer_us * self.layers, 1)
        mixed = speed.decode_bytes_per_s * (1 - WEIGHT) + self.weight_bytes / took_us * 1e6 * WEIGHT
        return msgspec.structs.replace(speed, decode_bytes_per_s=round(mixed))


class Measuring:
    """Measures for one node; `post` hands an event to its mediator."""

    def __init__(self, mediator: Mediator, machine: Machine, probing: Probing, stages: Stages) -> None:
        self._mediator = mediator
        self._machine = machine
        self._probing = probing
        self._stages = stages
        self._speeds: dict[str, Speed] = {}
        self._ways: dict[NodeId, Way] = {}
        self._measured_at: dict[NodeId, float] = {}
        self._slices: dict[Path, _Slice | None] = {}
        self._looked_at: dict[str, tuple[float, Statistics]] = {}
        self.loads: dict[str, StageLoad] = {}
        """Of the stages here, by `<run>/<stage>`: between the last two looks."""

    async def run(self, post: Callable[[Event], Awaitable[None]]) -> None:
        """Measure for as long as the node runs."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._repeat, self._look_at_ways, post)
            if not self._speeds:
                self._speeds = await self._known_speeds()
            await self._repeat(self._look_at_stages, post)

    async def _repeat(self, look: Callable[[], Awaitable[None]], post: Callable[[Event], Awaitable[None]]) -> None:
        told = Measured({}, {})
        while True:
            found = Measured(self._speeds, self._ways)
            if found != told:
                await post(found)
                told = found
            await look()
            await trio.sleep(LOOK_S)

    async def _known_speeds(self) -> dict[str, Speed]:
        path = self._machine.folder / SPEED_FILE
        kept = await trio.to_thread.run_sync(_read, path, self._machine.identity)
        if kept is not None:
            return kept
        try:
            speeds = await machine_speed(self._machine)
            data = msgspec.json.encode(_Kept(self._machine.identity, time.time(), speeds))
            await trio.to_thread.run_sync(write_atomic, path, data)
        except (MeshError, OSError) as error:
            log.warning("the speed of this machine is not known: %s", error)
            return {}
        return speeds

    def _linked(self) -> list[NodeId]:
        """The peers a way is told from, the nearest first."""
        found = [(link.rtt_s, node) for node, link in self._mediator.links.links.items() if link.up and link.rtt_s]
        return [node for _, node in sorted(found) if node in self._mediator.roster.entries][:WAYS]

    async def _look_at_ways(self) -> None:
        """One peer after the other: two transfers at once would share this node's line."""
        linked = self._linked()
        known = {node: way for node, way in self._ways.items() if node in self._mediator.roster.entries}
        for node in linked:
            if trio.current_time() < self._measured_at.get(node, -WAY_S) + WAY_S:
                continue
            self._measured_at[node] = trio.current_time()
            try:
                known[node] = await self._probing.way(node)
            except (MeshError, OSError) as error:
                log.info("the way to %s could not be measured: %s", self._mediator.name_of(node), error)
        self._ways = known

    async def _look_at_stages(self) -> None:
        """What stages took to decode one row, in place of what was measured without them; and how busy they were."""
        counted = await self._stages.statistics()
        self._look_at_loads({f"{order.fence.run}/{order.stage}": counts for order, _, counts in counted})
        for _, slice_path, statistics in counted:
            decode_us = statistics.cost_us.get(1, 0)
            if statistics.microbatches < FEW or decode_us <= 0:
                continue
            if slice_path not in self._slices:
                self._slices[slice_path] = await trio.to_thread.run_sync(_slice, slice_path)
            held = self._slices[slice_path]
            if held is not None and held.kind in self._speeds:
                corrected = held.correct(self._speeds[held.kind], decode_us)
                self._speeds = {**self._speeds, held.kind: corrected}

    def _look_at_loads(self, counted: Mapping[str, Statistics]) -> None:
        now, before = trio.current_time(), self._looked_at
        self.loads = {
            name: _load(now - before[name][0], before[name][1], counts)
            for name, counts in counted.items()
            if name in before
        }
        self._looked_at = {name: (now, counts) for name, counts in counted.items()}


def _load(took_s: float, before: Statistics, now: Statistics) -> StageLoad:
    microbatches = now.microbatches - before.microbatches
    rows = round((now.rows - before.rows) / microbatches, 2) if microbatches else None
    return StageLoad(min(round((now.compute_us - before.compute_us) / 1e6 / took_s, 3), 1.0), rows)


def _slice(path: Path) -> _Slice | None:
    """From its header; None for a file that is gone by now."""
    try:
        footprint = read_footprint(path)
    except (MeshError, OSError):
        return None
    weights = sum(layer.read_bytes or layer.weight_bytes for layer in footprint.layers) + footprint.output_bytes
    return _Slice(footprint.weight_kind, weights, len(footprint.layers))


def _read(path: Path, machine: str) -> dict[str, Speed] | None:
    """The kept speeds of this very machine, unless they are too old; whatever is wrong with the file: none."""
    try:
        with path.open("rb") as file:
            kept = msgspec.json.decode(file.read(SPEED_BYTES), type=_Kept)
    except (OSError, msgspec.MsgspecError, ValueError):
        return None
    return kept.speeds if kept.machine == machine and 0 <= time.time() - kept.at < KEPT_S else None


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("model name", "Model"))), platform.machine())
