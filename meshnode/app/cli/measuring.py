"""`verify` and `bench`: run a model here and tell what was measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

from meshnode.app.bench.cutover import CutoverOptions, print_cutover, run_cutover
from meshnode.app.bench.joining import JoinOptions, print_join, run_join
from meshnode.app.bench.linking import LinkOptions, print_link, run_link
from meshnode.app.bench.memory import MemoryOptions, print_memory, run_memory
from meshnode.app.bench.model import write_model
from meshnode.app.bench.planning import PlanOptions, print_plan, run_plan
from meshnode.app.bench.scanning import ScanOptions, print_scan, run_scan
from meshnode.app.bench.split import SplitOptions, print_split, run_split
from meshnode.app.cli.inquiries import write_json
from meshnode.app.cli.tables import size
from meshnode.app.config import parse_cuts
from meshnode.app.verify import verify_model
from meshnode.errors import ConfigError

Report = TypeVar("Report")


def verify(model: Path, stages: int, cuts: str | None, as_json: bool) -> int:
    """Compare whole and split; 0 when they agree or the model is refused with a reason, 1 otherwise."""
    report = verify_model(model.expanduser().absolute(), stages, parse_cuts(cuts) if cuts else None)
    if as_json:
        write_json(report)
    else:
        console = Console(highlight=False, soft_wrap=True)
        head = f"{report.model} ({report.architecture}, {report.layers} layers): {report.verdict}"
        console.print(
            head, markup=False, style="green" if report.exact else "yellow" if not report.exit_code else "red"
        )
        if report.cuts:
            console.print(f"  cut at {', '.join(map(str, report.cuts))}")
        if report.max_abs_diff is not None and not report.exact:
            same = "the same" if report.tokens_equal else "other"
            console.print(f"  largest difference of a logit {report.max_abs_diff:g}, {same} tokens")
        if report.reason:
            console.print(f"  {report.reason}", markup=False)
    return report.exit_code


def bench_split(options: SplitOptions, as_json: bool) -> int:
    """Measure what splitting costs."""
    report = _measured(partial(run_split, options))
    if as_json:
        write_json(report)
    else:
        print_split(report, Console(highlight=False))
    return 0


def bench_memory(options: MemoryOptions, as_json: bool) -> int:
    """Measure what stages take; 0 when each keeps to what the planner reserves for it."""
    report = _measured(partial(run_memory, options))
    if as_json:
        write_json(report)
    else:
        print_memory(report, Console(highlight=False))
    return 0 if report.within else 1


def bench_join(options: JoinOptions, as_json: bool) -> int:
    """Measure what people wait for; 0 when no round missed a bar."""
    report = _measured(partial(run_join, options))
    if as_json:
        write_json(report)
    else:
        print_join(report, Console(highlight=False))
    return 0 if report.within else 1


def bench_link(options: LinkOptions, as_json: bool) -> int:
    """Measure a stream between two members; 0 when every figure meets its bar."""
    report = _measured(partial(run_link, options))
    if as_json:
        write_json(report)
    else:
        print_link(report, Console(highlight=False))
    return 0 if report.within else 1


def bench_cutover(options: CutoverOptions, as_json: bool) -> int:
    """Measure what clients notice of a cut-over; 0 without errors and long pauses."""
    report = _measured(partial(run_cutover, options))
    if as_json:
        write_json(report)
    else:
        print_cutover(report, Console(highlight=False))
    return 0 if report.within else 1


def bench_scan(options: ScanOptions, as_json: bool) -> int:
    """Measure how late the event loop is while files are read; 0 within the bar."""
    report = _measured(partial(run_scan, options))
    if as_json:
        write_json(report)
    else:
        print_scan(report, Console(highlight=False))
    return 0 if report.within else 1


def bench_plan(options: PlanOptions, as_json: bool) -> int:
    """Compare predictions with what is measured; 0 when each is within the bar."""
    report = _measured(partial(run_plan, options))
    if as_json:
        write_json(report)
    else:
        print_plan(report, Console(highlight=False))
    return 0 if report.within else 1


def _measured(run: Callable[[Callable[[str], None]], Report]) -> Report:
    """Run, and tell on stderr what is being measured, if somebody watches."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        return run(lambda step: None)
    with console.status("starting") as now:
        return run(now.update)


def bench_model(out: Path, layers: int, embd: int, kind: str) -> int:
    """Write the synthetic model."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"cannot write to {out}", "Give the path of a file, in a directory that exists.")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"writing {out.name}", total=None)
        write_model(layers, embd, kind, out, progress=lambda done, total: bar.update(task, completed=done, total=total))
    Console(highlight=False, soft_wrap=True).print(f"{out}: {size(out.stat().st_size)}", markup=False)
    return 0
