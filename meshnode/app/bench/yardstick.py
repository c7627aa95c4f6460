"""Plain llama.cpp in a child process, asked for one measurement at a time."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from meshnode.io.stage.spawn import ChildProcess
from meshnode.wire.messages import RunOptions

_MODULE = "meshnode.io.llama.plain"


@dataclass(frozen=True)
class Yardstick:
    """A loaded model; every method blocks this task until the child has measured."""

    child: ChildProcess

    async def decode(self, streams: int, tokens: int) -> list[float]:
        """Seconds of each step of `streams` rows in one batch."""
        return list(map(float, (await self._ask(op="decode", streams=streams, tokens=tokens))["seconds"]))

    async def prefill(self, tokens: int, chunk: int) -> float:
        """Seconds until the first token of a prompt of `tokens`."""
        return float((await self._ask(op="prefill", tokens=tokens, chunk=chunk))["seconds"][0])

    async def greedy(self, prompt: Sequence[int], tokens: int, chunk: int) -> list[int]:
        """The most likely continuation, its prompt worked off in chunks of `chunk`."""
        return list(map(int, (await self._ask(op="greedy", prompt=list(prompt), tokens=tokens, chunk=chunk))["tokens"]))

    async def load(self, model: Path, run: RunOptions, threads: int, chunk: int) -> None:
        """Load `model` as a run with these options would, whole. `chunk` is the most rows of a decode."""
        await self._ask(
            op="load",
            model=str(model),
            context=run.context,
            lanes=run.lanes,
            chunk=chunk,
            kv_type=run.kv_type,
            flash_attention=run.flash_attention,
            threads=threads,
            kv_unified=run.kv_unified,
        )

    async def _ask(self, **request: Any) -> dict[str, Any]:
        connection = self.child.connection
        answer = bytearray()
        try:
            data = json.dumps(request).encode() + b"\n"
            while data:
                data = data[await connection.send(data) :]
            while not answer.endswith(b"\n"):
                part = await connection.recv(1 << 16)
                if not part:
                    break
                answer += part
        except OSError:
            answer.clear()
        if not answer:
            await self.child.ended.wait()
            raise self.child.lost()
        reply: dict[str, Any] = json.loads(answer)
        return reply


@asynccontextmanager
async def open_yardstick(
    model: Path, run: RunOptions, threads: int, chunk: int | None = None
) -> AsyncIterator[Yardstick]:
    """Plain llama.cpp with `model` loaded; gone afterwards."""
    async with trio.open_nursery() as nursery:
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
        child = await ChildProcess.start(nursery, "plain llama.cpp", _MODULE, environment)
        try:
            yardstick = Yardstick(child)
            await yardstick.load(model, run, threads, chunk or run.chunk)
            yield yardstick
        finally:
            await child.aclose()
        nursery.cancel_scope.cancel()
