"""The asking of the probe, and what the first good run of a model answered, kept beside its manifest.

    <cache>/<manifest digest>/probe-<KV type>.json

Invariant: a record is written once, by a run that passed, and a run that contradicts it is not listed.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

import msgspec
import trio

from meshnode.core.serving.prefixes import Reuse
from meshnode.core.serving.probe import (
    TOP,
    compare,
    judge,
    probe_requests,
    probe_tokens,
    reuse_of,
)
from meshnode.core.serving.request import Generator, Sampled
from meshnode.core.serving.text import Vocabulary
from meshnode.errors import StageError
from meshnode.io.disk.atomic import write_atomic
from meshnode.wire.messages import Claim

log = logging.getLogger("meshnode.head")

_RECORD_BYTES: Final = 4096
"""Twenty-one numbers take 200."""


class Recorded(msgspec.Struct, frozen=True):
    """One record."""

    asked: tuple[int, ...]
    """The probe's tokens: another version of this program may ask another question."""
    answered: tuple[int, ...]
    """The most likely tokens, most likely first."""


class Probes:
    """Asks runs the probe, and remembers per model and KV type. `cache`: the folder of the artifacts."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._asked = 0

    async def ask(self, run: Generator, claim: Claim, vocabulary: Vocabulary) -> Reuse:
        """The probe through all stages of `run`, and, where nobody else is served yet, what they can use again of ended
        requests. Raises StageError("probe_failed"), and what a generation raises."""
        self._asked += 1
        tokens = probe_tokens(vocabulary)
        requests = probe_requests(f"probe-{claim.fence.run}-{self._asked}", tokens)
        whole, again, halves = [await _only(run.generate(request)) for request in requests]
        best = judge(whole, halves)
        path = self._cache / claim.manifest_digest / f"probe-{claim.options.kv_type}.json"
        recorded = await trio.to_thread.run_sync(_read, path)
        if recorded is not None and recorded.asked == tokens:
            compare(whole, recorded.answered, str(path))
        else:
            await trio.to_thread.run_sync(_write, path, Recorded(tokens, best))
        return reuse_of(whole, again)


async def _only(generation: AbstractAsyncContextManager[AsyncIterator[Sampled]]) -> Sampled:
    async with generation as tokens:
        async for sampled in tokens:
            return sampled
    raise StageError("probe_failed", "the probe gave no token")


def _read(path: Path) -> Recorded | None:
    """None where there is none, or something else."""
    try:
        with path.open("rb") as file:
            found = msgspec.json.decode(file.read(_RECORD_BYTES), type=Recorded)
    except (OSError, msgspec.MsgspecError, ValueError):
        return None
    return found if 1 <= len(found.answered) <= TOP else None


def _write(path: Path, record: Recorded) -> None:
    """A run is not refused because the disk is full: the next good one is the first then."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, msgspec.json.encode(record))
    except OSError as error:
        log.warning("the answer to the probe could not be kept: %s", error)
