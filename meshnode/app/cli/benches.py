"""`meshnode bench ...`: the measurements and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meshnode.app.cli.registering import Json, command

bench_group = typer.Typer(help="Measure this machine.", no_args_is_help=True, rich_markup_mode=None)


@command(bench_group, "split")
def bench_split(
    model: Annotated[Path | None, typer.Option(help="Measure this GGUF instead of a synthetic one.")] = None,
    layers: Annotated[int, typer.Option(help="Layers of the synthetic model.")] = 24,
    embd: Annotated[int, typer.Option(help="Its width.")] = 1024,
    kind: Annotated[str, typer.Option("--type", help="Its tensor type.")] = "q8_0",
    stages: Annotated[int, typer.Option(help="Measure 1 to this many stages.")] = 2,
    threads: Annotated[int, typer.Option(help="Compute threads of a stage, and of plain llama.cpp.")] = 1,
    rounds: Annotated[int, typer.Option(help="Interleaved repetitions.")] = 5,
    json: Json = False,
) -> int:
    """Plain llama.cpp and the split in turns: tokens per second, time to first token, cost of a stage and its hop."""
    from meshnode.app.bench.split import SplitOptions
    from meshnode.app.cli.measuring import bench_split as run

    options = SplitOptions(
        model=model, layers=layers, embd=embd, type=kind, stages=stages, threads=threads, rounds=rounds
    )
    return run(options, json)


@command(bench_group, "memory")
def bench_memory(
    layers: Annotated[int, typer.Option(help="Layers of the synthetic models.")] = 24,
    embd: Annotated[int, typer.Option(help="Their width.")] = 1024,
    stages: Annotated[int, typer.Option(help="How many stages.")] = 2,
    json: Json = False,
) -> int:
    """Memory of each stage beside its weights and its cache. Exit code 1 when it is more than the planner reserves."""
    from meshnode.app.bench.memory import MemoryOptions
    from meshnode.app.cli.measuring import bench_memory as run

    return run(MemoryOptions(layers=layers, embd=embd, stages=stages), json)


@command(bench_group, "join")
def bench_join(
    rounds: Annotated[int, typer.Option(help="How often; a round takes 15 s.")] = 5,
    json: Json = False,
) -> int:
    """Seconds to join by invite, to see a mesh on this network, to find it again. Exit code 1 over a bar."""
    from meshnode.app.bench.joining import JoinOptions
    from meshnode.app.cli.measuring import bench_join as run

    return run(JoinOptions(rounds=rounds), json)


@command(bench_group, "link")
def bench_link(
    trips: Annotated[int, typer.Option(help="Round trips a round.")] = 1000,
    megabytes: Annotated[int, typer.Option(help="Bulk a round, in MB.")] = 512,
    rounds: Annotated[int, typer.Option(help="Repetitions.")] = 5,
    json: Json = False,
) -> int:
    """Round trip and throughput of a stream between two members on loopback. Exit code 1 beside a bar."""
    from meshnode.app.bench.linking import LinkOptions
    from meshnode.app.cli.measuring import bench_link as run

    return run(LinkOptions(trips=trips, megabytes=megabytes, rounds=rounds), json)


@command(bench_group, "cutover")
def bench_cutover(
    model: Annotated[Path | None, typer.Option(help="Serve this GGUF instead of a synthetic one.")] = None,
    layers: Annotated[int, typer.Option(help="Layers of the synthetic model.")] = 12,
    embd: Annotated[int, typer.Option(help="Its width.")] = 1024,
    streams: Annotated[int, typer.Option(help="Clients that stream all the time.")] = 2,
    threads: Annotated[int, typer.Option(help="Compute threads of a stage.")] = 1,
    json: Json = False,
) -> int:
    """Pauses between tokens while a machine is drained, and errors. Exit code 1 for an error or beside the bar."""
    from meshnode.app.bench.cutover import CutoverOptions
    from meshnode.app.cli.measuring import bench_cutover as run

    return run(CutoverOptions(model=model, layers=layers, embd=embd, streams=streams, threads=threads), json)


@command(bench_group, "scan")
def bench_scan(
    files: Annotated[int, typer.Option(help="Model files that are opened at once.")] = 100,
    json: Json = False,
) -> int:
    """How late the event loop is while model files are read and hashed. Exit code 1 beside the bar."""
    from meshnode.app.bench.scanning import ScanOptions
    from meshnode.app.cli.measuring import bench_scan as run

    return run(ScanOptions(files), json)


@command(bench_group, "plan")
def bench_plan(
    model: Annotated[Path | None, typer.Option(help="Try this GGUF instead of a synthetic one.")] = None,
    layers: Annotated[int, typer.Option(help="Layers of the synthetic model.")] = 12,
    embd: Annotated[int, typer.Option(help="Its width.")] = 2048,
    kind: Annotated[str, typer.Option("--type", help="Its tensor type.")] = "q8_0",
    threads: Annotated[int, typer.Option(help="Compute threads of a stage.")] = 1,
    rounds: Annotated[int, typer.Option(help="Measured so often, in turns with the prediction.")] = 3,
    json: Json = False,
) -> int:
    """Predicted and measured time of a token on six pipelines. Exit code 1 when one is more than 15 % off."""
    from meshnode.app.bench.planning import PlanOptions
    from meshnode.app.cli.measuring import bench_plan as run

    return run(PlanOptions(model=model, layers=layers, embd=embd, type=kind, threads=threads, rounds=rounds), json)


@command(bench_group, "model")
def bench_model(
    out: Annotated[Path, typer.Option(help="Where to write it.")],
    layers: Annotated[int, typer.Option(help="Layers.")] = 24,
    embd: Annotated[int, typer.Option(help="Width.")] = 1024,
    kind: Annotated[str, typer.Option("--type", help="Tensor type: f32, f16, q8_0, q4_0, ...")] = "q8_0",
) -> int:
    """Write the synthetic benchmark model: Llama shape, 32k vocabulary, random weights."""
    from meshnode.app.cli.measuring import bench_model as run

    return run(out, layers, embd, kind)
