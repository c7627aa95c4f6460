"""Run one slice on stock llama.cpp: rows of tokens or activations in, activations or logits out.

One thread decodes; only `abort` may come from another. The engine knows no protocol: the stage process feeds it.
Invariant: a decode answers with exactly as many rows as asked, or it is a StageError; never a wrong answer. Logits are
finite; whether activations are is seen where they are packed for the wire (wire.rowcodec), which looks at each anyway.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshnode.core.serving.text import Vocabulary
from meshnode.errors import StageError
from meshnode.io.llama import native
from meshnode.io.llama.batch import Batch, LogitsView, RowBuffer
from meshnode.io.llama.embedding import EmbeddingTable
from meshnode.io.llama.gguf_file import open_model
from meshnode.io.llama.kept_tap import KeptTap
from meshnode.io.llama.native import api
from meshnode.io.llama.slice_keys import INTO_KEY, TAP_KEY
from meshnode.io.llama.tap import Tap
from meshnode.io.llama.vocabulary import tokens_of
from meshnode.wire.limits import SCORED_ROWS

KV_TYPES = {"f16": api.GGML_TYPE_F16, "q8_0": api.GGML_TYPE_Q8_0, "q4_0": api.GGML_TYPE_Q4_0}
# llama.cpp's own bound on sequences (LLAMA_MAX_SEQ).
LANES_MAX = 256
# Cells a lane of a context that lives for one row: llama.cpp computes attention over as many at least.
_TRIAL_CELLS = 256
_MROPE_TYPES = (api.LLAMA_ROPE_TYPE_MROPE, getattr(api, "LLAMA_ROPE_TYPE_IMROPE", 40))

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """How a slice runs; the same on every stage.

    `context` in cells (all lanes together where `kv_unified`), `chunk` the most rows of a decode.
    """

    context: int
    lanes: int
    chunk: int
    kv_type: str
    flash_attention: bool
    threads: int
    kv_unified: bool = True


@dataclass(frozen=True)
class Rows:
    """A microbatch of n rows: n `tokens` on the first stage, `activations` (n, width) on later ones."""

    positions: Sequence[int]
    lanes: Sequence[int]
    logits: Sequence[bool]
    tokens: Sequence[int] | None = None
    activations: NDArray[np.float32] | None = None


class SliceEngine:
    """A loaded slice.

    `width` values a row, `vocabulary` tokens (0 but on the last stage), `trim_any` whether a lane can be cut anywhere,
    `one_lane` whether a microbatch holds rows of one lane only (recurrent graphs reorder the rows of several).
    """

    def __init__(self, options: EngineOptions, first: bool, last: bool) -> None:
        self.options, self.first, self.last = options, first, last
        self.width = self.vocabulary = 0
        self.trim_any = True
        self.one_lane = False
        self._model: Any = None
        self._context: Any = None
        self._memory: Any = None
        self._table: EmbeddingTable | None = None
        self._tap: Tap | KeptTap | None = None
        self._reading = Lock()
        """Held by another thread that reads the vocabulary: what it reads is not freed under it."""
        self._abort = native.AbortFlag()
        self._reported = native.LogTap()

    @staticmethod
    def load(
        slice_path: Path,
        embedding_path: Path | None,
        options: EngineOptions,
        *,
        first: bool,
        last: bool,
        progress: Callable[[float], bool] | None = None,
    ) -> SliceEngine:
        """Load a slice file (the model itself when `first` and `last`) and prove with a probe decode that it runs.

        `progress(fraction)` returns False to stop. Errors: ModelError, StageError with reason load_failed, cancelled,
        tap_missed or non_finite.
        """
        if not 1 <= options.lanes <= LANES_MAX or options.chunk < 1 or options.kv_type not in KV_TYPES:
            raise StageError("bad_options", f"{options} is not possible")
        engine = SliceEngine(options, first, last)
        try:
            engine._open(slice_path, embedding_path, progress)
        except BaseException:
            engine.close()
            raise
        return engine

    def _open(self, path: Path, embedding: Path | None, progress: Callable[[float], bool] | None) -> None:
        native.start()
        described = open_model(path)
        out, into = described.scalar(TAP_KEY), described.scalar(INTO_KEY)
        if (out is None or bool(out) == self.last) and not (self.first and self.last):
            raise StageError("load_failed", f"{path.name} is not the slice file of such a stage")
        if self.first and not self.last:
            if embedding is None:
                raise StageError("load_failed", "the first stage needs the token embedding")
            self._table = EmbeddingTable(embedding)
        native.listen(self._reported)
        try:
            self._load_model(path, progress)
            self.width = api.llama_model_n_embd(self._model)
            self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model)) if self.last else 0
            self.one_lane = api.llama_model_is_recurrent(self._model) or api.llama_model_is_hybrid(self._model)
            self.trim_any = not self.one_lane
            # What goes in and what comes out: llama.cpp has taken the one before it gives the other.
            self._rows = RowBuffer(self.options.chunk, self.width)
            if (out or into) and not (self.first and self.last):
                self._make_tapped(str(out), str(into))
            else:
                self._make_context(None)
                self._probe()
        finally:
            native.listen(None)

    def _load_model(self, path: Path, progress: Callable[[float], bool] | None) -> None:
        parameters = api.llama_model_default_params()
        stopped = False

        def report(fraction: float, _user: object) -> bool:
            nonlocal stopped
            stopped = stopped or (progress is not None and not progress(fraction))
            return not stopped

        callback = api.llama_progress_callback(report)
        parameters.progress_callback = callback
        parameters.n_gpu_layers = -1
        # Read, not mapped: weights that llama.cpp repacks for this processor would otherwise stay mapped beside their
        # copy (a 98 MB slice of Q4_0 took 277 MB, read 207 MB, at the same speed).
        parameters.load_mode = api.LLAMA_LOAD_MODE_NONE
        self._model = api.llama_model_load_from_file(str(path).encode(), parameters)
        if stopped:
            raise StageError("cancelled", "loading was stopped")
        if not self._model:
            raise StageError("load_failed", f"llama.cpp refused {path.name}: {'; '.join(self._reported.errors)}")

    def _make_tapped(self, out: str, into: str) -> None:
        """A context with the cheapest tap that gives the right bits for this slice and library."""
        callback = Tap(out.encode(), into.encode(), self._rows)
        # Behind the tap lies nothing but the end of the graph, or a pass-through layer (which the callback leaves out).
        if not into and out.endswith(f"-{api.llama_model_n_layer(self._model) - 1}"):
            self._make_context(callback, min(self.options.context, _TRIAL_CELLS * self.options.lanes))
            expected = self._probe()
            self._free_context()
            try:
                self._make_context(KeptTap(out.encode(), self._rows, LANES_MAX))
                if self._probe() == expected:
                    return
            except StageError as error:
                if error.reason not in ("load_failed", "tap_missed"):
                    raise
            log.warning("activations are read through the callback: without it this library gives others")
            self._free_context()
        self._make_context(callback)
        self._probe()

    def _make_context(self, tap: Tap | KeptTap | None, cells: int = 0) -> None:
        options, parameters = self.options, api.llama_context_default_params()
        self._tap = tap
        parameters.n_ctx = cells or options.context
        parameters.n_batch = parameters.n_ubatch = options.chunk
        parameters.n_seq_max = options.lanes
        self._outputs_max = min(options.chunk, max(options.lanes, SCORED_ROWS) if self.last else options.chunk)
        parameters.n_outputs_max = self._outputs_max
        parameters.n_threads = parameters.n_threads_batch = options.threads
        parameters.flash_attn_type = int(options.flash_attention)
        parameters.type_k = parameters.type_v = KV_TYPES[options.kv_type]
        parameters.kv_unified = options.kv_unified
        # A window cache of full size: cutting a lane back stays possible at any position.
        parameters.swa_full = True
        parameters.abort_callback = self._abort.callback
        parameters.abort_callback_data = self._abort.data
        parameters.no_perf = True
        if self._tap is not None:
            self._tap.attach(parameters)
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise StageError("load_failed", f"llama.cpp made no context: {'; '.join(self._reported.errors)}")
        self._memory = api.llama_get_memory(self._context)
        if api.llama_n_seq_max(self._context) < options.lanes:
            raise StageError("load_failed", f"llama.cpp gave fewer lanes than {options.lanes}")
        mrope = api.llama_model_rope_type(self._model) in _MROPE_TYPES
        by_tokens = (self.first and self.last) or (isinstance(self._tap, Tap) and bool(self._tap.into))
        source = 0 if by_tokens else self._rows.address
        self._batch = Batch(options.chunk, mrope and not by_tokens, not self.last, source)
        self._logits = LogitsView(self._outputs_max, self.vocabulary)

    def _free_context(self) -> None:
        if self._context:
            api.llama_free(self._context)
            self._context = self._memory = None
        if self._tap is not None:
            self._tap.close()
            self._tap = None
        # What was said of its buffers is over; the weights stay.
        for kind in self._reported.bytes.keys() - {"model"}:
            del self._reported.bytes[kind]

    def _probe(self) -> bytes:
        """What one row becomes. Errors: StageError where it cannot be computed, or is not finite."""
        activations = None if self.first else np.full((1, self.width), 0.01, np.float32)
        given = self._finite(self.decode(Rows((0,), (0,), (True,), (0,) if self.first else None, activations)))
        self.clear(0)
        return given.tobytes()

    def decode(self, rows: Rows) -> NDArray[np.float32]:
        """Run n rows: activations (n, width), on the last stage logits (flagged rows, vocabulary).

        The array is a view that the next decode overwrites. Errors: StageError with reason bad_rows, no_kv_room,
        aborted, fatal, tap_missed or (logits) non_finite; after aborted or fatal ask `next_position` and trim.
        """
        count = len(rows.positions)
        wanted = sum(rows.logits) if self.last else 0
        self._prepare(rows, count, wanted)
        self._run(rows.lanes)
        if not self.last:
            return self._rows.array[:count]
        if not wanted:
            return np.empty((0, self.vocabulary), np.float32)
        return self._finite(self._logits.rows(self._context, wanted))

    def rehearse(self, rows: Rows) -> None:
        """All that `decode` does with these rows before it enters native code: that is in the caches again then."""
        self._prepare(rows, len(rows.positions), sum(rows.logits) if self.last else 0)

    def _prepare(self, rows: Rows, count: int, wanted: int) -> None:
        self._check(rows, count, wanted)
        self._batch.fill(rows.positions, rows.lanes, rows.logits)
        self._feed(rows, count)

    def _check(self, rows: Rows, count: int, wanted: int) -> None:
        lanes, tokens, activations = rows.lanes, rows.tokens, rows.activations
        fits = 0 < count <= self.options.chunk and len(lanes) == len(rows.logits) == count
        if not fits or wanted > self._outputs_max:
            raise StageError("bad_rows", f"a microbatch of {count} rows does not fit this stage")
        if self.first and (tokens is None or len(tokens) != count):
            raise StageError("bad_rows", f"{count} rows without a token each")
        if not self.first and (activations is None or activations.shape != (count, self.width)):
            raise StageError("bad_rows", f"activations of another shape than {(count, self.width)}")
        if min(lanes) < 0 or max(lanes) >= self.options.lanes or (self.one_lane and min(lanes) != max(lanes)):
            raise StageError("bad_rows", "a lane outside the range of this stage, or several where one is possible")

    def _feed(self, rows: Rows, count: int) -> None:
        """Put the input of `count` rows where llama.cpp finds it."""
        if not self.first:
            self._rows.array[:count] = rows.activations
            return
        assert rows.tokens is not None
        if self._table is not None:
            self._table.look_up(rows.tokens, self._rows)
            return
        if min(rows.tokens) < 0 or max(rows.tokens) >= self.vocabulary:
            raise StageError("bad_rows", "a token outside the vocabulary")
        for row, token in enumerate(rows.tokens):
            self._batch.tokens[row] = token

    def _run(self, lanes: Sequence[int]) -> None:
        if self._tap is not None:
            self._tap.begin(lanes)
        result = self._batch.decode(self._context)
        if result == 1:
            raise StageError("no_kv_room", "no room in the KV cache for these rows")
        if result == 2:
            self._abort.clear()
            raise StageError("aborted", "the decode was stopped")
        if result != 0:
            raise StageError("fatal", f"llama.cpp failed a decode ({result})")
        if self._tap is not None and not self._tap.end(self._context):
            raise StageError("tap_missed", "the graph did not give its activations exactly once")

    def _finite(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        # The sum of squares is not finite when any value is not; the exact test runs only then (squares may overflow).
        flat = values.reshape(-1)
        if not math.isfinite(float(flat.dot(flat))) and not np.isfinite(values).all():
            raise StageError("non_finite", "the stage computed values that are not finite")
        return values

    def trim(self, lane: int, position: int) -> bool:
        """Forget positions >= `position` of a lane; False where this model cannot (only `clear` works there)."""
        return bool(api.llama_memory_seq_rm(self._memory, lane, position, -1))

    def clear(self, lane: int) -> None:
        """Forget a lane."""
        if not api.llama_memory_seq_rm(self._memory, lane, -1, -1):
            raise StageError("fatal", f"lane {lane} cannot be cleared")

    def copy(self, source: int, target: int, length: int) -> None:
        """Make `target` the first `length` positions of `source`.

        Errors: StageError with reason bad_copy where only whole lanes can be copied.
        """
        held = self.next_position(source)
        if source == target or held < length or (not self.trim_any and length not in (0, held)):
            raise StageError("bad_copy", f"lane {source} holds {held} positions, {length} cannot be copied")
        self.clear(target)
        if not length:
            return
        if self.options.kv_unified and self.trim_any:
            api.llama_memory_seq_cp(self._memory, source, target, 0, length)
            return
        api.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        if held != length and not self.trim(target, length):
            raise StageError("fatal", f"lane {target} cannot be cut to {length}")

    def next_position(self, lane: int) -> int:
        """The position that follows what the lane holds; 0 for an empty lane."""
        return int(api.llama_memory_seq_pos_max(self._memory, lane)) + 1

    def tokens(self) -> Vocabulary:
        """What the tokens say, from any thread; on the last stage only: the files of the others know none."""
        with self._reading:
            if not self._model:
                raise StageError("not_loaded", "the slice was unloaded")
            return tokens_of(self._model)

    def abort(self) -> None:
        """Stop the running decode (from another thread); it ends with reason aborted."""
        self._abort.set()

    def fingerprint(self) -> str:
        """What decides low bits: build, processor features and options, as 16 hexadecimal digits."""
        facts = (native.REQUIRED_VERSION, api.llama_print_system_info().decode(), repr(self.options))
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]

    def memory_bytes(self) -> dict[str, int]:
        """Bytes by kind (model, kv, rs, compute, output) as llama.cpp reported them, to 0.01 MiB."""
        return dict(self._reported.bytes)

    def close(self) -> None:
        """Free everything; twice is fine."""
        self._free_context()
        with self._reading:
            if self._model:
                api.llama_model_free(self._model)
                self._model = None
        if self._table is not None:
            self._table.close()
            self._table = None
