"""`meshnode verify`: does a split of this model on this machine give the bits of the whole?

Everything native runs in child processes: an abort of native code is a verdict, not a crash. Both sides run with the
same KV type, flash attention, threads and shapes of batches.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from meshnode.errors import ConfigError
from meshnode.io.llama.attention import default_kv_type, flash_attention
from meshnode.io.llama.gguf_file import GgufModel, open_model
from meshnode.io.llama.manifest import layer_count
from meshnode.io.llama.traits import Keys, ModelTraits, all_kinds_wanted, traits_of

Verdict = Literal["exact", "different", "not_splittable", "failed"]
# A 70 B model on a slow disk loads and runs a few dozen rows well within this; a stuck child ends.
CHILD_TIMEOUT_S = 3_600
Side = Literal["whole", "split"]
_SIDES: tuple[Side, ...] = ("whole", "split")


class VerifyReport(msgspec.Struct, frozen=True):
    """What came out; `max_abs_diff` and `tokens_equal` are None where nothing ran."""

    model: str
    architecture: str
    layers: int
    verdict: Verdict
    exact: bool
    max_abs_diff: float | None
    tokens_equal: bool | None
    cuts: tuple[int, ...]
    allowed_cuts: tuple[int, ...]
    reason: str = ""

    @property
    def exit_code(self) -> int:
        """0 for exact or honestly refused, 1 for any difference or crash."""
        return 0 if self.verdict in ("exact", "not_splittable") else 1


class VerifyJob(msgspec.Struct, frozen=True):
    """What a child is told: run one side, write its logits to `output`."""

    side: Side
    path: str
    output: str
    cuts: tuple[int, ...]
    kv_type: str
    flash_attention: bool
    interleave: bool
    """Rows of two lanes in one microbatch (recurrent models get one lane a microbatch)."""


def verify_model(path: Path, stages: int = 2, cuts: Sequence[int] | None = None) -> VerifyReport:
    """Compare a split of `path` with the whole: into `stages` slices, or at `cuts`.

    Errors: ModelError for a file that cannot be read, ConfigError for impossible cuts.
    """
    model = open_model(path)
    layers = layer_count(model)
    traits = traits_of(model.keys, layers)
    report = VerifyReport(
        path.name, traits.architecture, layers, "not_splittable", False, None, None, (), traits.boundaries
    )
    if traits.whole:
        return msgspec.structs.replace(report, reason=traits.whole)
    chosen = tuple(cuts) if cuts else default_cuts(traits, stages)
    bounds = (0, *chosen, layers)
    if any(first >= last for first, last in pairwise(bounds)):
        raise ConfigError(f"cuts {chosen} do not ascend within {layers} layers", f"Allowed: {traits.boundaries}")
    report = msgspec.structs.replace(report, cuts=chosen)
    reason = _forbidden(traits, chosen)
    if reason:
        return msgspec.structs.replace(report, reason=reason)
    with tempfile.TemporaryDirectory(prefix="meshnode-verify-") as folder:
        failure = _run_sides(model, traits, chosen, Path(folder))
        if failure:
            return msgspec.structs.replace(report, verdict="failed", reason=failure)
        whole, split = (np.load(Path(folder) / f"{side}.npy") for side in _SIDES)
    return _compared(report, whole, split)


def _compared(report: VerifyReport, whole: np.ndarray, split: np.ndarray) -> VerifyReport:
    exact = bool(np.array_equal(whole, split))
    return msgspec.structs.replace(
        report,
        verdict="exact" if exact else "different",
        exact=exact,
        max_abs_diff=float(np.abs(whole - split).max()),
        tokens_equal=bool(np.array_equal(whole.argmax(axis=1), split.argmax(axis=1))),
    )


def default_cuts(traits: ModelTraits, stages: int) -> tuple[int, ...]:
    """Cuts into `stages` slices, as even as what is allowed permits.

    Errors: ConfigError for more stages than the model has allowed cuts.
    """
    if stages < 2:
        raise ConfigError(f"{stages} stages are no split", "Choose 2 or more.")
    wanted = all_kinds_wanted(traits)
    chosen: list[int] = []
    for stage in range(1, stages):
        goal = stage * traits.layers / stages
        before = chosen[-1] if chosen else 0
        usable = [
            cut
            for cut in traits.boundaries
            if cut > before and not (wanted and (traits.missing(before, cut) or traits.missing(cut, traits.layers)))
        ]
        usable = usable[: len(usable) - (stages - 1 - stage)]  # what the stages behind need stays free
        counts = traits.row.counts
        usable = [cut for cut in usable if not {cut - before, traits.layers - cut} & set(counts)] or usable
        if not usable:
            most = len(traits.boundaries) + 1
            at_most = f"at most {most} stages" if not wanted else "fewer stages, or give the cuts yourself"
            raise ConfigError(f"{stages} stages do not fit on what this model allows", f"Choose {at_most}.")
        chosen.append(min(usable, key=lambda cut: (abs(cut - goal), cut)))
    return tuple(chosen)


def _forbidden(traits: ModelTraits, cuts: Sequence[int]) -> str:
    for cut in cuts:
        if cut not in traits.boundaries:
            return f"this model cannot be cut at layer {cut}"
    for first, last in pairwise((0, *cuts, traits.layers)):
        if last - first in traits.row.counts and len(cuts) > 0:
            return f"llama.cpp takes a slice of {last - first} layers for another model"
    return ""


def _run_sides(model: GgufModel, traits: ModelTraits, cuts: tuple[int, ...], folder: Path) -> str:
    """Run both sides; return what went wrong, empty when nothing did."""
    read = Keys(model.keys)
    for side in _SIDES:
        job = VerifyJob(
            side=side,
            path=str(model.files[0]),
            output=str(folder / f"{side}.npy"),
            cuts=cuts,
            kv_type=default_kv_type(traits, read),
            flash_attention=flash_attention(traits),
            interleave=not traits.one_lane_batches,
        )
        failure = _run_child(job)
        if failure:
            return f"{side}: {failure}"
    return ""


def _run_child(job: VerifyJob) -> str:
    command = [sys.executable, "-m", "meshnode.app.verify_main"]
    try:
        done = subprocess.run(
            command, input=msgspec.json.encode(job), capture_output=True, timeout=CHILD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {CHILD_TIMEOUT_S} s"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    telling = [line for line in lines if "GGML_ASSERT" in line or "rror" in line] or lines
    ended = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return f"{ended}: {telling[-1][:300] if telling else 'no message'}"
