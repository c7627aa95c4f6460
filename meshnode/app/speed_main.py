"""Entry of the child that measures a machine: `python -m meshnode.app.speed_main FD`, one request, one answer, the end.

A process of its own because it loads llama.cpp and keeps a core busy for seconds: the node goes on meanwhile, and
measures what its stages will get, under the same quota and with the same threads.
"""

from __future__ import annotations

import socket
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Final

import msgspec
import trio

from meshnode.app.bench.model import write_model
from meshnode.app.bench.rig import Rig, RigOptions, open_rig
from meshnode.core.membership.announcement import Speed
from meshnode.core.node.offers import USUAL
from meshnode.io.disk.lock import turn
from meshnode.io.llama.speed import Timed, time_model
from meshnode.wire.messages import RunOptions

KINDS: Final = {"q8_0": "q8_0", "q4_k": "q4_k_m", "f16": "f16"}
"""Kind of weights -> type of the synthetic model: whole bytes, the usual four bits, halves. Others are like one of
them (core/node/offers)."""
NARROW: Final = (16, 256)
"""Layers and width of a model in which reading weights is next to nothing: what is left is what a layer costs."""
WIDTH: Final = 2048
"""Of the models whose weights are timed: matrices of the size that small models have."""
_VOCABULARY: Final = 512
_TOKENS: Final = 80
"""Of the pipeline: half a second, several periods of a quota."""
LAYER_US_MAX: Final = 200
"""Thirty steps of a graph, each with threads that meet, took 2 to 20. Beyond this the machine was busy with something
else while it was measured, and the weights' own time says so better."""
_LAYER_BYTES: Final = {"q8_0": 48_000_000, "q4_k": 30_000_000, "f16": 90_000_000}


class SpeedRequest(msgspec.Struct, frozen=True):
    """What to measure."""

    threads: int
    bytes: int
    """Weights of one timed model: larger than the processor's caches, as a slice is."""
    folder: str
    """Where the models may lie meanwhile."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Of weights; the first is measured in any case."""


class MachineSpeed(msgspec.Struct, frozen=True):
    """The answer, by kind of weights."""

    speeds: dict[str, Speed]


def measure(request: SpeedRequest) -> MachineSpeed:
    """Measure this machine. Raises MeshError, OSError."""
    with tempfile.TemporaryDirectory(prefix="speed-", dir=request.folder) as folder:
        model = Path(folder) / "model.gguf"
        write_model(*NARROW, USUAL, model, _VOCABULARY)
        narrow = time_model(model, request.threads)
        timed: dict[str, Timed] = {}
        stage_us = 0
        for kind in dict.fromkeys((USUAL, *request.kinds)):
            layers = max(1, request.bytes // _LAYER_BYTES[kind])
            write_model(layers, WIDTH, KINDS[kind], model, _VOCABULARY)
            timed[kind] = time_model(model, request.threads)
            if kind == USUAL:
                stage_us = trio.run(_stage_us, model, request.threads)
    wide = timed[USUAL]
    read_us = narrow.weight_bytes / wide.weight_bytes * wide.decode_us
    layer_us = min(max(0.0, narrow.decode_us - read_us) / narrow.layers, LAYER_US_MAX)
    speeds = {
        kind: Speed(each.decode_bytes_per_s(layer_us), each.prefill_bytes_per_s, round(layer_us), stage_us)
        for kind, each in timed.items()
    }
    return MachineSpeed(speeds)


async def _stage_us(model: Path, threads: int) -> int:
    """Of a pipeline of one stage on loopback: the time of a token less what the engine took.

    With a model that fills the caches as a real one does: with a tiny one the same steps took a quarter of the time.
    """
    run = RunOptions(context=1024, lanes=1, chunk=128, kv_type="q8_0", flash_attention=True)
    async with open_rig(model, RigOptions(stages=1, threads=threads, run=run)) as rig:
        return max(1, round(min([await _overhead_us(rig) for _ in range(2)])))


async def _overhead_us(rig: Rig) -> float:
    times: list[float] = []
    before = (await rig.statistics())[0]
    await rig.generate((1,), _TOKENS, on_token=lambda _: times.append(perf_counter()))
    after = (await rig.statistics())[0]
    computed = (after.compute_us - before.compute_us) / (after.microbatches - before.microbatches)
    return (times[-1] - times[0]) / (len(times) - 1) * 1e6 - computed


def main() -> None:
    """Answer the one request."""
    with socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rwb") as lines:
        request = msgspec.json.decode(lines.readline(), type=SpeedRequest)
        with turn("measuring"):  # several nodes on one machine would measure each other
            answer = measure(request)
        lines.write(msgspec.json.encode(answer) + b"\n")
        lines.flush()


if __name__ == "__main__":
    main()
