"""`meshnode bench plan`: does a token take as long as the planner says, over 1 to 4 stages, quotas and slow links?

Each case is measured and predicted in turns, as a mesh does it: a machine's speed by the child process that nodes
measure with, under the quota of that node; links through the forwarder that the run then uses; the prediction by the
planner itself. A machine's speed drifts, so the prediction of a round is the mean of those from just before and after.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, closing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final

import msgspec
import trio
from rich.console import Console
from rich.table import Table

from meshnode.app.bench.delay import DelayedLink, loopback
from meshnode.app.bench.model import write_model
from meshnode.app.bench.quota import Quotas
from meshnode.app.bench.rig import Rig, RigOptions, Surroundings, open_rig
from meshnode.app.measuring import Machine, machine_speed
from meshnode.app.verify import default_cuts
from meshnode.core.membership.announcement import Speed, Way
from meshnode.core.node.offers import speed_of
from meshnode.core.planning import Demand, DeploymentId, Inventory, NodeInventory, make_plan
from meshnode.core.planning.footprint import ModelFootprint
from meshnode.core.planning.inventory import LinkInventory
from meshnode.core.planning.plan import Plan
from meshnode.core.planning.prediction import predicted
from meshnode.errors import ConfigError, ModelError
from meshnode.identity.ids import NodeId, node_id_of
from meshnode.io.llama.footprint import read_footprint
from meshnode.io.llama.gguf_file import open_model
from meshnode.io.llama.manifest import layer_count
from meshnode.io.llama.traits import traits_of
from meshnode.wire.messages import RunOptions

BAR_PERCENT: Final = 15
"""Predicted against measured (COORDINATION)."""
_TOKENS: Final = 46
_PARTS: Final = 3
"""Of them, of which the best counts: as nodes measure their speed (io/llama/speed)."""
_PROMPT: Final = 8
_CONTEXT: Final = 256
_MEMORY: Final = 1 << 40
"""Of every imagined node: where to cut is given, memory shall not decide."""


@dataclass(frozen=True)
class PlanRig:
    """A pipeline to try: percent of a processor for each node, milliseconds one way between any two."""

    quotas: tuple[int, ...]
    delay_ms: float = 0.0

    @property
    def name(self) -> str:
        """For people."""
        stages = f"{len(self.quotas)} stage{'s' * (len(self.quotas) > 1)}"
        return f"{stages}, {'/'.join(map(str, self.quotas))} %, {self.delay_ms:g} ms"


RIGS: Final = (
    PlanRig((100,)),
    PlanRig((100, 100)),
    PlanRig((100, 50)),
    PlanRig((100, 100), 5.0),
    PlanRig((100, 25, 100), 10.0),
    PlanRig((100, 100, 50, 100), 25.0),
)


@dataclass(frozen=True)
class PlanOptions:
    """What to try. `model` None: a synthetic one."""

    model: Path | None = None
    layers: int = 12
    embd: int = 2048
    type: str = "q8_0"
    threads: int = 1
    rounds: int = 3
    rigs: tuple[PlanRig, ...] = RIGS

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= 100 or not 1 <= self.threads <= 256:
            raise ConfigError("bench plan takes 1 to 100 rounds of 1 to 256 threads", "--rounds 3 --threads 1")


class PlanCase(msgspec.Struct, frozen=True):
    """One rig; medians of the rounds."""

    name: str
    quotas: tuple[int, ...]
    delay_ms: float
    predicted_ms: float = 0.0
    measured_ms: float = 0.0
    error_percent: float = 0.0
    """Of the prediction: positive where a token was faster than predicted."""
    errors_percent: tuple[float, ...] = ()
    """Of every round."""
    within: bool = False
    skipped: str = ""


class PlanReport(msgspec.Struct, frozen=True):
    """The object of `bench plan --json`."""

    model: str
    threads: int
    rounds: int
    bar_percent: int
    cases: tuple[PlanCase, ...]
    within: bool


class _Around(Surroundings):
    """Quotas and links of one plan: the head is on the first node of the rig."""

    def __init__(self, plan: Plan, rig: PlanRig, quotas: Quotas, link: DelayedLink) -> None:
        self._nodes = plan.nodes
        self._rig, self._quotas, self._link = rig, quotas, link

    def started(self, stage: int, pid: int) -> None:
        self._quotas.put(pid, self._rig.quotas[_number(self._nodes[stage])])

    async def hop(self, number: int) -> tuple[socket.socket, socket.socket]:
        ends = (_node(0), *self._nodes, _node(0))[number : number + 2]
        return loopback() if ends[0] == ends[1] else await self._link.connect()


def run_plan(options: PlanOptions, progress: Callable[[str], None] = lambda _: None) -> PlanReport:
    """Measure. Raises ConfigError, ModelError, StageError, StageLost."""
    with tempfile.TemporaryDirectory(prefix="meshnode-bench-") as folder, closing(Quotas()) as quotas:
        model = options.model
        if model is None:
            model = Path(folder) / f"noise-{options.layers}x{options.embd}-{options.type}.gguf"
            progress(f"writing {model.name}")
            write_model(options.layers, options.embd, options.type, model)
        bench = _Bench(options, model, Path(folder), quotas)
        cases = tuple(trio.run(bench.case, rig, progress) for rig in options.rigs)
    within = all(case.within for case in cases if not case.skipped)
    return PlanReport(model.name, options.threads, options.rounds, BAR_PERCENT, cases, within)


class _Bench:
    """One model, tried in several rigs."""

    def __init__(self, options: PlanOptions, model: Path, folder: Path, quotas: Quotas) -> None:
        self._options, self._model, self._quotas = options, model, quotas
        # Before anything is measured, which takes minutes.
        self._cuts = _cuts(model, max(len(rig.quotas) for rig in options.rigs))
        self._footprint: ModelFootprint = read_footprint(model, "0" * 64)
        self._machine = Machine(options.threads, 8_000_000_000, folder)

    async def case(self, rig: PlanRig, progress: Callable[[str], None]) -> PlanCase:
        """Predict and measure in turns."""
        if min(rig.quotas) < 100 and not self._quotas.available:
            return PlanCase(rig.name, rig.quotas, rig.delay_ms, skipped="no quota of a processor can be set here")
        async with trio.open_nursery() as nursery:
            link = DelayedLink(nursery, rig.delay_ms / 1000)
            progress(f"{rig.name}: measuring")
            speeds = [await self._speeds(rig)]
            ways = [await link.measure()]
            plan = self._plan(rig, speeds[0], ways[0])
            async with self._pipeline(plan, rig, link) as pipeline:
                await _token_us(pipeline)
                measured = []
                for number in range(self._options.rounds):
                    progress(f"{rig.name}: round {number + 1} of {self._options.rounds}")
                    measured.append(await _token_us(pipeline))
                    speeds.append(await self._speeds(rig))
                    ways.append(await link.measure())
            nursery.cancel_scope.cancel()
        told = [self._predicted(plan, rig, *each) for each in zip(speeds, ways, strict=True)]
        return _case(rig, [(a + b) / 2 for a, b in pairwise(told)], measured)

    def _pipeline(self, plan: Plan, rig: PlanRig, link: DelayedLink) -> AbstractAsyncContextManager[Rig]:
        run = RunOptions(_CONTEXT, 1, 128, plan.kv_type, plan.flash_attention)
        how = RigOptions(
            stages=len(plan.stages),
            cuts=tuple(stage.first for stage in plan.stages[1:]),
            threads=self._options.threads,
            run=run,
        )
        return open_rig(self._model, how, _Around(plan, rig, self._quotas, link))

    async def _speeds(self, rig: PlanRig) -> dict[int, Speed]:
        """By quota."""
        found = {}
        for percent in sorted(set(rig.quotas)):
            kinds = (self._footprint.weight_kind,) if self._footprint.weight_kind in ("q4_k", "f16") else ()
            speeds = await machine_speed(self._machine, kinds, partial(self._started, percent))
            found[percent] = speed_of(speeds, self._footprint.weight_kind)
        return found

    def _started(self, percent: int, pid: int) -> None:
        self._quotas.put(pid, percent)

    def _inventory(self, rig: PlanRig, speeds: dict[int, Speed], way: Way) -> Inventory:
        nodes = tuple(
            NodeInventory(
                _node(number),
                f"node {number}",
                _MEMORY,
                decode_bytes_per_s=speeds[percent].decode_bytes_per_s,
                prefill_bytes_per_s=speeds[percent].prefill_bytes_per_s,
                layer_us=speeds[percent].layer_us,
                stage_us=speeds[percent].stage_us,
            )
            for number, percent in enumerate(rig.quotas)
        )
        links = tuple(
            LinkInventory(a.node, b.node, way.rtt_us, way.bytes_per_s) for a in nodes for b in nodes if a is not b
        )
        return Inventory(nodes, links)

    def _plan(self, rig: PlanRig, speeds: dict[int, Speed], way: Way) -> Plan:
        """What the planner makes of it, with as many stages as the rig has nodes."""
        demand = Demand(
            deployment=DeploymentId("bench"),
            version=1,
            author=_node(0),
            manifest_digest=self._footprint.manifest_digest,
            model=self._footprint.name,
            context=_CONTEXT,
            lanes=1,
            cuts=self._cuts[len(rig.quotas) - 1],
        )
        made = make_plan(demand, self._footprint, self._inventory(rig, speeds, way))
        if not isinstance(made, Plan):
            raise ModelError(f"no plan for {rig.name}: {made.text()}")
        return made

    def _predicted(self, plan: Plan, rig: PlanRig, speeds: dict[int, Speed], way: Way) -> float:
        told = predicted(plan, self._footprint, self._inventory(rig, speeds, way))
        assert told is not None, "every node of the rig is there"
        assert told.prediction is not None, "which is what was asked for"
        return told.prediction.token_us


def _cuts(model: Path, most: int) -> tuple[tuple[int, ...], ...]:
    """For 1, 2, ... `most` stages. ModelError for a model that has not as many."""
    opened = open_model(model)
    traits = traits_of(opened.keys, layer_count(opened))
    hint = f"take one of {most} layers or more"
    if traits.whole and most > 1:
        raise ModelError(f"this model cannot be split: {traits.whole}", hint)
    try:
        return ((), *(default_cuts(traits, stages) for stages in range(2, most + 1)))
    except ConfigError:
        raise ModelError(f"this model cannot be split over {most} stages, which are tried here", hint) from None


def _case(rig: PlanRig, told_us: list[float], measured_us: list[float]) -> PlanCase:
    errors = [(told / took - 1) * 100 for told, took in zip(told_us, measured_us, strict=True)]
    return PlanCase(
        name=rig.name,
        quotas=rig.quotas,
        delay_ms=rig.delay_ms,
        predicted_ms=round(median(told_us) / 1000, 2),
        measured_ms=round(median(measured_us) / 1000, 2),
        error_percent=round(median(errors), 1),
        errors_percent=tuple(round(error, 1) for error in errors),
        within=abs(median(errors)) <= BAR_PERCENT,
    )


async def _token_us(rig: Rig) -> float:
    """The mean of a part: under a quota a token runs or stands still in turns."""
    times: list[float] = []
    await rig.generate(range(1, 1 + _PROMPT), _TOKENS, on_token=lambda _: times.append(perf_counter()))
    size = (len(times) - 1) // _PARTS
    return min(times[at + size] - times[at] for at in range(0, size * _PARTS, size)) / size * 1e6


def _node(number: int) -> NodeId:
    return node_id_of(bytes([number]))


def _number(node: NodeId) -> int:
    return next(number for number in range(256) if _node(number) == node)


def print_plan(report: PlanReport, console: Console) -> None:
    """The report for people."""
    head = f"{report.model}, {report.threads} thread(s) a stage, medians of {report.rounds} rounds"
    console.print(f"{head}; bar: {report.bar_percent} %")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("RIG: NODES' SHARE OF A PROCESSOR, ONE WAY")
    for name in ("PREDICTED MS", "MEASURED MS", "ERROR %", ""):
        table.add_column(name, justify="right")
    for case in report.cases:
        if case.skipped:
            table.add_row(case.name, "", "", "", f"skipped: {case.skipped}")
            continue
        figures = (f"{case.predicted_ms:.2f}", f"{case.measured_ms:.2f}", f"{case.error_percent:+.1f}")
        table.add_row(case.name, *figures, "" if case.within else "too far")
    console.print(table)
