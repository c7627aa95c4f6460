"""The child process of `meshnode verify`: runs one side of the comparison and writes its logits.

Reads a VerifyJob as JSON from stdin. Ends with code 0, or with a message on stderr; native code may abort it.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshnode.app.verify import VerifyJob
from meshnode.errors import MeshError
from meshnode.io.llama.engine import EngineOptions, Rows, SliceEngine
from meshnode.io.llama.gguf_file import open_model
from meshnode.io.llama.manifest import build_manifest, open_artifacts
from meshnode.io.llama.slicing import layout_embedding, layout_slice, write_slice

# Enough rows to pass a sliding window of the test models (32) and a KV block of 32, small enough for a 70 B model.
PREFILL_ROWS = 48
DECODE_STEPS = 8
# The same on both sides; sizes of chunks decide low bits.
_CONTEXT, _LANES, _CHUNK = 512, 2, 64

Decode = Callable[[Rows], NDArray[np.float32]]


@dataclass(frozen=True)
class _Step:
    """Rows of one microbatch: positions, lanes, and which of them want logits."""

    positions: list[int]
    lanes: list[int]
    flags: list[bool]


def steps(interleave: bool) -> Iterator[_Step]:
    """A prefill, a decode run, then two lanes in turns (in one microbatch with `interleave`)."""
    count = PREFILL_ROWS
    yield _Step(list(range(count)), [0] * count, [index >= count - 4 for index in range(count)])
    for step in range(DECODE_STEPS):
        yield _Step([count + step], [0], [True])
    short = 5
    yield _Step(list(range(short)), [1] * short, [index == short - 1 for index in range(short)])
    for step in range(DECODE_STEPS // 2):
        here, there = count + DECODE_STEPS + step, short + step
        if interleave:
            yield _Step([here, there], [0, 1], [True, True])
        else:
            yield _Step([here], [0], [True])
            yield _Step([there], [1], [True])


def run(decode: Decode, vocabulary: int, interleave: bool) -> NDArray[np.float32]:
    """All logits (rows, vocabulary) of the steps, for tokens that depend on nothing but the vocabulary."""
    random = np.random.default_rng(20)
    collected = []
    for step in steps(interleave):
        count = len(step.positions)
        tokens = random.integers(0, vocabulary, count).tolist()
        rows = Rows(step.positions, step.lanes, step.flags, tokens)
        collected.append(decode(rows).copy())
    return np.concatenate(collected)


def _options(job: VerifyJob) -> EngineOptions:
    return EngineOptions(_CONTEXT, _LANES, _CHUNK, job.kv_type, job.flash_attention, threads=1)


def run_whole(job: VerifyJob) -> NDArray[np.float32]:
    """The logits of the unsplit model."""
    engine = SliceEngine.load(Path(job.path), None, _options(job), first=True, last=True)
    return run(engine.decode, engine.vocabulary, job.interleave)


def run_split(job: VerifyJob) -> NDArray[np.float32]:
    """The logits of the stages, one after the other in this process."""
    model = open_model(Path(job.path))
    manifest = build_manifest(model)
    bounds = (0, *job.cuts, manifest.layers)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=Path(job.output).parent)))
        artifacts = stack.enter_context(open_artifacts(model, manifest))
        embedding = folder / "embedding.gguf"
        write_slice(layout_embedding(model.keys, manifest), artifacts.read, embedding)
        stages = []
        for first, last in pairwise(bounds):
            path = folder / f"{first}.gguf"
            write_slice(layout_slice(model.keys, manifest, first, last), artifacts.read, path)
            start, end = first == 0, last == manifest.layers
            stages.append(SliceEngine.load(path, embedding if start else None, _options(job), first=start, last=end))

        def decode(rows: Rows) -> NDArray[np.float32]:
            values = stages[0].decode(rows)
            for stage in stages[1:]:
                values = stage.decode(Rows(rows.positions, rows.lanes, rows.logits, None, values))
            return values

        return run(decode, stages[-1].vocabulary, job.interleave)


def main() -> int:
    """Run the job that stdin holds."""
    os.environ["GGML_NO_BACKTRACE"] = "1"  # an abort is our verdict; attaching a debugger takes seconds
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(message)s")
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=VerifyJob)
    try:
        logits = run_whole(job) if job.side == "whole" else run_split(job)
    except MeshError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    np.save(job.output, logits)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
