"""Plain llama.cpp, as the yardstick: a bare decode loop over the whole model, nothing of ours in between.

python -m meshnode.io.llama.plain <fd>      one JSON object a line over the socket <fd>, one answer each

{"op": "load", ...PlainOptions}                      -> {"ok": true}
{"op": "decode", "streams": 4, "tokens": 64}         -> {"seconds": [...]}  one entry a step of all streams
{"op": "prefill", "tokens": 1024, "chunk": 512}      -> {"seconds": [...]}  one entry, the last row's logits read
{"op": "greedy", "prompt": [...], "tokens": 32, "chunk": 128} -> {"tokens": [...]}
"""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from meshnode.io.llama import native
from meshnode.io.llama.engine import KV_TYPES
from meshnode.io.llama.native import api

_PROMPT = 16
"""Tokens each stream has before its decode steps are timed."""


@dataclass(frozen=True)
class PlainOptions:
    """Same meaning as in the engine."""

    model: str
    context: int
    lanes: int
    chunk: int
    kv_type: str
    flash_attention: bool
    threads: int
    kv_unified: bool = True


class PlainLlama:
    """One model, one context, one batch."""

    def __init__(self, options: PlainOptions) -> None:
        native.start()
        self._model = api.llama_model_load_from_file(options.model.encode(), api.llama_model_default_params())
        if not self._model:
            raise RuntimeError("llama.cpp did not load the model")
        parameters = api.llama_context_default_params()
        parameters.n_ctx = options.context
        parameters.n_batch = parameters.n_ubatch = options.chunk
        parameters.n_seq_max = options.lanes
        parameters.n_threads = parameters.n_threads_batch = options.threads
        parameters.flash_attn_type = int(options.flash_attention)
        parameters.type_k = parameters.type_v = KV_TYPES[options.kv_type]
        parameters.kv_unified = options.kv_unified
        parameters.no_perf = True
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._memory = api.llama_get_memory(self._context)
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(options.chunk, 0, 1)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Rows of (token, position, lane, logits); the most likely token after each row with logits."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, lane, logits) in enumerate(rows):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, logits
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = lane
        if api.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        wanted = sum(row[3] for row in rows)
        if not wanted:
            return []
        rows_of_logits = np.ctypeslib.as_array(api.llama_get_logits(self._context), (wanted, self._vocabulary))
        return [int(token) for token in rows_of_logits.argmax(axis=1)]

    def _prompt(self, lane: int, prompt: list[int], chunk: int) -> int:
        api.llama_memory_seq_rm(self._memory, lane, -1, -1)
        token = -1
        for at in range(0, len(prompt), chunk):
            part = prompt[at : at + chunk]
            last = at + len(part) == len(prompt)
            rows = [(item, at + i, lane, last and i == len(part) - 1) for i, item in enumerate(part)]
            token = (self._decode(rows) or [-1])[0]
        return token

    def clear(self) -> None:
        """Forget every lane."""
        api.llama_memory_clear(self._memory, False)

    def decode(self, streams: int, tokens: int) -> list[float]:
        """Seconds of each step of `streams` rows in one batch, greedy."""
        self.clear()
        last = [self._prompt(lane, list(range(lane + 1, lane + 1 + _PROMPT)), _PROMPT) for lane in range(streams)]
        seconds = []
        for step in range(tokens):
            start = perf_counter()
            last = self._decode([(last[lane], _PROMPT + step, lane, True) for lane in range(streams)])
            seconds.append(perf_counter() - start)
        return seconds

    def prefill(self, tokens: int, chunk: int) -> list[float]:
        """Seconds for a prompt of `tokens` in chunks of `chunk`."""
        self.clear()
        prompt = [1 + i % (self._vocabulary - 1) for i in range(tokens)]
        start = perf_counter()
        self._prompt(0, prompt, chunk)
        return [perf_counter() - start]

    def greedy(self, prompt: list[int], tokens: int, chunk: int) -> list[int]:
        """The first `tokens` tokens after `prompt`."""
        self.clear()
        out = [self._prompt(0, prompt, chunk)]
        while len(out) < tokens:
            out += self._decode([(out[-1], len(prompt) + len(out) - 1, 0, True)])
        return out


def answer(plain: PlainLlama | None, request: dict[str, Any]) -> tuple[PlainLlama | None, dict[str, Any]]:
    """Carry out one request."""
    operation = request.pop("op")
    if operation == "load":
        return PlainLlama(PlainOptions(**request)), {"ok": True}
    assert plain is not None
    match operation:
        case "decode":
            return plain, {"seconds": plain.decode(**request)}
        case "prefill":
            return plain, {"seconds": plain.prefill(**request)}
        case "greedy":
            return plain, {"tokens": plain.greedy(**request)}
    raise RuntimeError(f"unknown operation {operation}")


def main() -> None:
    """Serve until the parent closes the socket."""
    plain: PlainLlama | None = None
    with socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rwb") as lines:
        for line in lines:
            plain, reply = answer(plain, json.loads(line))
            lines.write(json.dumps(reply).encode() + b"\n")
            lines.flush()


if __name__ == "__main__":
    main()
