"""`meshnode bench split`: plain llama.cpp and the same model split, in turns within one run.

A machine's speed drifts by tens of per cent from minute to minute, so only ratios of neighbouring measurements count:
each case is measured once, one after the other, and a ratio is the median over rounds of the quotients. Where the
memory of a process happens to lie makes it faster or slower by some per cent for as long as it lives, which no
repetition within it averages out: that is half a millisecond a token, as much as a stage costs. So a round starts its
processes several times: the first start measures everything, each of them one stream, and the overhead of a stage is
the median over all starts. The quartiles beside it say how far that median can be trusted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Final

import msgspec
import trio
from rich.console import Console
from rich.table import Table

from meshnode.app.bench.model import write_model
from meshnode.app.bench.rig import Rig, RigOptions, SlicedModel, open_sliced, slice_model
from meshnode.app.bench.yardstick import Yardstick, open_yardstick
from meshnode.app.verify import default_cuts
from meshnode.errors import ConfigError, ModelError
from meshnode.io.llama.footprint import footprint_of
from meshnode.io.llama.gguf_file import open_model
from meshnode.io.llama.manifest import layer_count
from meshnode.io.llama.traits import traits_of
from meshnode.wire.messages import RunOptions

STREAMS: Final = (1, 2, 4, 8)
_TOKENS: Final = {1: 48, 2: 64, 4: 32, 8: 16}
"""Tokens a stream: about a second each at 100 tokens/s in all."""
_STARTS: Final = 3
"""Of all processes in a round. A start takes some 7 s, what only the first of them measures 25 s more."""
_TURNS: Final = 2
"""Of one stream on each side in a start, so that what else the machine does meets all of them."""
_WARM: Final = 16
"""Tokens of one stream before anything counts: memory is touched, and the graphs are built."""
_QUIET: Final = 0.1
"""Plain llama.cpp, started again on a machine that does nothing else, is within a twentieth of its median."""
_PROMPT: Final = 16
_PLAIN_CHUNK: Final = 512
"""llama.cpp's own default for a prompt."""


@dataclass(frozen=True)
class SplitOptions:
    """What to measure. `model` None: a synthetic one of `layers` x `embd`, of `type`."""

    model: Path | None = None
    layers: int = 24
    embd: int = 1024
    type: str = "q8_0"
    stages: int = 2
    threads: int = 1
    rounds: int = 5
    prefill_tokens: int = 1024
    wire_dtype: str = "f16"
    streams: tuple[int, ...] = STREAMS

    def __post_init__(self) -> None:
        if not 1 <= self.stages <= 16 or not 1 <= self.threads <= 256:
            raise ConfigError("bench split takes 1 to 16 stages of 1 to 256 threads", "--stages 2 --threads 1")
        if not 1 <= self.rounds <= 100 or not 32 <= self.prefill_tokens <= 4096:
            raise ConfigError("bench split takes 1 to 100 rounds and prompts of 32 to 4096 tokens", "--rounds 5")
        if set(self.streams) - set(STREAMS) or 1 not in self.streams:
            raise ConfigError(f"streams are 1 and some of {STREAMS}", "--streams 1,2,4,8")


@dataclass(frozen=True)
class _Subject:
    """A model that was looked at: its path, what both sides run with, and the cuts for 1, 2, ... stages."""

    path: Path
    run: RunOptions
    cuts: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(path: Path, options: SplitOptions) -> _Subject:
        """Raises ModelError, ConfigError."""
        model = open_model(path)
        traits = traits_of(model.keys, layer_count(model))
        if traits.whole and options.stages > 1:
            raise ModelError(f"this model cannot be split: {traits.whole}", "measure it with --stages 1")
        cuts = ((), *(default_cuts(traits, stages) for stages in range(2, options.stages + 1)))
        footprint = footprint_of(model)
        run = RunOptions(
            context=options.prefill_tokens + 1024,
            lanes=max(options.streams),
            chunk=128,
            kv_type=footprint.kv_type,
            flash_attention=footprint.flash_attention,
            wire_dtype=options.wire_dtype,
        )
        return _Subject(path, run, cuts)


class SplitCase(msgspec.Struct, frozen=True):
    """Medians of one subject. Rates in tokens per second, of all streams together."""

    name: str
    stages: int
    """0: plain llama.cpp."""
    decode: dict[int, float]
    """By number of streams."""
    prefill: float
    first_token_ms: float
    """Of a prompt of 16 tokens."""
    stage_overhead_us: float | None = None
    """(time a token - plain) / stages."""
    stage_internal_us: tuple[float, ...] = ()
    """What each stage itself spent a microbatch outside of llama.cpp."""


class SplitReport(msgspec.Struct, frozen=True):
    """The object of `bench split --json`."""

    model: str
    threads: int
    rounds: int
    starts: int
    """Of all processes: one sample of one stream each."""
    cases: tuple[SplitCase, ...]
    ratios: dict[str, float | None]
    """one_stream_vs_plain, two_streams_vs_one, prefill_vs_plain; of the case with most stages."""
    stage_overhead_us: float
    stage_overhead_quartiles_us: tuple[float, float]
    """Half of the starts lie between."""
    plain_spread: float
    """Distance of the quartiles of plain llama.cpp's time a token, of its median: what the machine itself varied."""


class _Samples:
    """Samples of one side by what was measured: `decode[1]` has one a start, the others have one a round."""

    def __init__(self, name: str, stages: int) -> None:
        self.name, self.stages = name, stages
        self.decode: dict[int, list[float]] = {}
        self.prefill: list[float] = []
        self.first: list[float] = []
        self.internal_us: list[list[float]] = []

    def case(self, plain: _Samples) -> SplitCase:
        return SplitCase(
            name=self.name,
            stages=self.stages,
            decode={streams: median(rates) for streams, rates in self.decode.items()},
            prefill=median(self.prefill),
            first_token_ms=median(self.first) * 1000,
            stage_overhead_us=median(self.overheads_us(plain)) if self.stages else None,
            stage_internal_us=tuple(round(median(stage), 1) for stage in zip(*self.internal_us, strict=True)),
        )

    def overheads_us(self, plain: _Samples) -> list[float]:
        """(time a token - plain) / stages, by start."""
        pairs = zip(self.decode[1], plain.decode[1], strict=True)
        return [(1 / own - 1 / theirs) * 1e6 / self.stages for own, theirs in pairs]


def run_split(options: SplitOptions, progress: Callable[[str], None] = lambda _: None) -> SplitReport:
    """Measure; `progress` hears what is measured next. Raises ConfigError, ModelError, StageError, StageLost."""
    with tempfile.TemporaryDirectory(prefix="meshnode-bench-") as folder:
        model = options.model
        if model is None:
            model = Path(folder) / f"noise-{options.layers}x{options.embd}-{options.type}.gguf"
            progress(f"writing {model.name}")
            write_model(options.layers, options.embd, options.type, model)
        return trio.run(_measure, options, _Subject.of(model, options), progress)


async def _measure(options: SplitOptions, subject: _Subject, progress: Callable[[str], None]) -> SplitReport:
    plain = _Samples("plain llama.cpp", 0)
    split = [_Samples(f"{n} stage{'s' * (n > 1)}", n) for n in range(1, options.stages + 1)]
    with tempfile.TemporaryDirectory(prefix="meshnode-bench-") as folder:
        rigs: list[tuple[SlicedModel, RigOptions]] = []
        for cuts in subject.cuts:
            how = RigOptions(stages=len(cuts) + 1, cuts=cuts, threads=options.threads, run=subject.run)
            into = Path(folder) / str(len(rigs))
            into.mkdir()
            rigs.append((await trio.to_thread.run_sync(slice_model, subject.path, how, into), how))
        for number in range(options.rounds * _STARTS):
            progress(f"round {number // _STARTS + 1} of {options.rounds}, start {number % _STARTS + 1} of {_STARTS}")
            async with AsyncExitStack() as stack:
                started = [await stack.enter_async_context(open_sliced(*rig)) for rig in rigs]
                yardstick = await stack.enter_async_context(
                    open_yardstick(subject.path, subject.run, options.threads, chunk=_PLAIN_CHUNK)
                )
                sides = list(zip(split, started, strict=True))
                await _one_stream((plain, yardstick), sides)
                if number % _STARTS == 0:
                    await _round((plain, yardstick), sides, options)
    return _report(options, subject.path, plain, split)


async def _one_stream(plain: tuple[_Samples, Yardstick], sides: Sequence[tuple[_Samples, Rig]]) -> None:
    """One stream on every side in turns. A sample is the mean of all turns: what stalls a token now and then counts."""
    samples, yardstick = plain
    everybody = [samples, *(side for side, _ in sides)]
    seconds = [0.0] * len(everybody)
    await _plain_decode(yardstick, 1, _WARM)
    for _, rig in sides:
        await _split_decode(rig, 1, _WARM)
    before = [await rig.statistics() for _, rig in sides]
    for _ in range(_TURNS):
        seconds[0] += 1 / await _plain_decode(yardstick, 1, _TOKENS[1])
        for number, (_, rig) in enumerate(sides, 1):
            seconds[number] += 1 / await _split_decode(rig, 1, _TOKENS[1])
    for side, took in zip(everybody, seconds, strict=True):
        side.decode.setdefault(1, []).append(_TURNS / took)
    for (side, rig), earlier in zip(sides, before, strict=True):
        stages = zip(await rig.statistics(), earlier, strict=True)
        side.internal_us.append(
            [(now.overhead_us - old.overhead_us) / max(now.microbatches - old.microbatches, 1) for now, old in stages]
        )


async def _round(
    plain: tuple[_Samples, Yardstick], sides: Sequence[tuple[_Samples, Rig]], options: SplitOptions
) -> None:
    """Each measurement of everybody before the next one: neighbours in time are compared."""
    samples, yardstick = plain
    for count in sorted(set(options.streams) - {1}):
        samples.decode.setdefault(count, []).append(await _plain_decode(yardstick, count, _TOKENS[count]))
        for side, rig in sides:
            side.decode.setdefault(count, []).append(await _split_decode(rig, count, _TOKENS[count]))
    for tokens, into in ((options.prefill_tokens, "prefill"), (_PROMPT, "first")):
        await _timed(samples, into, tokens, yardstick.prefill(tokens, _PLAIN_CHUNK))
        for side, rig in sides:
            await _timed(side, into, tokens, _first_token(rig, tokens))


async def _timed(samples: _Samples, into: str, tokens: int, seconds: Awaitable[float]) -> None:
    took = await seconds
    if into == "prefill":
        samples.prefill.append(tokens / took)
    else:
        samples.first.append(took)


async def _plain_decode(yardstick: Yardstick, streams: int, tokens: int) -> float:
    steps = await yardstick.decode(streams, tokens)
    return streams * len(steps) / sum(steps)


async def _split_decode(rig: Rig, streams: int, tokens: int) -> float:
    """Tokens per second of all streams while every one of them runs."""
    times: list[list[float]] = [[] for _ in range(streams)]

    async def one(number: int) -> None:
        prompt = range(number + 1, number + 1 + _PROMPT)
        # A few more than are counted: no stream may end while another is still timed.
        await rig.generate(prompt, tokens + 1, on_token=lambda _: times[number].append(perf_counter()))

    async with trio.open_nursery() as nursery:
        for number in range(streams):
            nursery.start_soon(one, number)
    started, ended = max(mine[0] for mine in times), min(mine[-1] for mine in times)
    counted = sum(sum(started < at <= ended for at in mine) for mine in times)
    return counted / (ended - started)


async def _first_token(rig: Rig, tokens: int) -> float:
    vocabulary = rig.loaded[-1].vocabulary
    started = perf_counter()
    await rig.generate([1 + index % (vocabulary - 1) for index in range(tokens)], 1)
    return perf_counter() - started


def _report(options: SplitOptions, model: Path, plain: _Samples, split: Sequence[_Samples]) -> SplitReport:
    most = split[-1]
    overheads = most.overheads_us(plain)
    low, high = _quartiles(overheads)
    times = [1 / rate for rate in plain.decode[1]]
    faster, slower = _quartiles(times)

    def quotient(own: Sequence[float], theirs: Sequence[float]) -> float:
        return round(median(a / b for a, b in zip(own, theirs, strict=True)), 4)

    # The starts that measured everything.
    two = quotient(most.decode[2], most.decode[1][::_STARTS]) if 2 in options.streams else None
    return SplitReport(
        model=model.name,
        threads=options.threads,
        rounds=options.rounds,
        starts=len(overheads),
        cases=tuple(side.case(plain) for side in (plain, *split)),
        ratios={
            "one_stream_vs_plain": quotient(most.decode[1], plain.decode[1]),
            "two_streams_vs_one": two,
            "prefill_vs_plain": quotient(most.prefill, plain.prefill),
        },
        stage_overhead_us=round(median(overheads), 1),
        stage_overhead_quartiles_us=(round(low, 1), round(high, 1)),
        plain_spread=round((slower - faster) / median(times), 4),
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def print_split(report: SplitReport, console: Console) -> None:
    """The report for people: tokens per second, by number of streams."""
    console.print(f"{report.model}, {report.threads} thread(s) a stage, medians of {report.rounds} rounds, tokens/s")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    counts = list(report.cases[0].decode)
    table.add_column("STREAMS")
    for name in (*map(str, counts), "PREFILL", "TTFT MS", "US/STAGE"):
        table.add_column(name, justify="right")
    for case in report.cases:
        rates = [f"{case.decode[count]:.1f}" for count in counts]
        overhead = "" if case.stage_overhead_us is None else f"{case.stage_overhead_us:.0f}"
        table.add_row(case.name, *rates, f"{case.prefill:.0f}", f"{case.first_token_ms:.0f}", overhead)
    console.print(table)
    for name, value in report.ratios.items():
        if value is not None:
            console.print(f"{name:20}  {value:.2f}")
    low, high = report.stage_overhead_quartiles_us
    console.print(
        f"{'stage_overhead_us':20}  {report.stage_overhead_us:.0f}  "
        f"({low:.0f} to {high:.0f} in half of {report.starts} starts)"
    )
    if report.plain_spread > _QUIET:
        console.print(
            f"Plain llama.cpp itself varied by {report.plain_spread:.0%}: something else used this machine.",
            style="yellow",
        )
