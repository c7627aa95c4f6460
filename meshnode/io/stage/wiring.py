"""What a stage process is put together from: the native engine, the sampler and TLS, handed in by app/stage_main.

Invariant: io/stage knows these shapes only; it imports neither llama.cpp nor the transport.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from meshnode.wire.activation import LaneSample, Open, Rows
from meshnode.wire.stage_protocol import LoadStage


class Engine(Protocol):
    """A loaded slice (io.llama.engine.SliceEngine). All of it runs on one thread, but for `abort`."""

    width: int
    vocabulary: int
    trim_any: bool

    def decode(self, rows: Rows, /) -> NDArray[np.float32]:
        """Activations (n, width), on the last stage logits (flagged rows, vocabulary); a view until the next decode.

        Raises StageError; afterwards `next_position` tells what the lanes hold.
        """

    def rehearse(self, rows: Rows, /) -> None:
        """All of `decode` but the decoding. Raises StageError."""

    def trim(self, lane: int, position: int) -> bool:
        """Forget positions >= `position`; False where this model cannot."""

    def clear(self, lane: int) -> None:
        """Forget a lane."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Make `target` the first `length` positions of `source`. Raises StageError where it cannot."""

    def next_position(self, lane: int) -> int:
        """What follows the last position held; 0 for an empty lane."""

    def abort(self) -> None:
        """From another thread: end the running decode with StageError("aborted")."""

    def fingerprint(self) -> str:
        """What decides low bits."""

    def memory_bytes(self) -> dict[str, int]:
        """Bytes by kind."""

    def close(self) -> None:
        """Free everything."""


class Sampler(Protocol):
    """The sampler chain of one lane (io.llama.sampler.LaneSampler)."""

    def draw(self, lane: int, position: int, logits: NDArray[np.float32]) -> LaneSample:
        """The next token from raw logits (vocabulary,) and remember it."""

    def score(self, lane: int, position: int, logits: NDArray[np.float32], target: int) -> LaneSample:
        """How likely `target` is, and what was likelier; nothing is remembered. Raises StageError for no token."""


@dataclass(frozen=True)
class Wiring:
    """The parts of a stage process."""

    build: str
    """Name and version of the native library, for Pong."""
    load_engine: Callable[[LoadStage, Callable[[float], bool]], Engine]
    """Load and probe; the callback takes a fraction and answers False to stop. Raises MeshError."""
    make_sampler: Callable[[Open, int], Sampler]
    """For an opened lane and the size of the vocabulary. Raises StageError for parameters outside it."""
    tls_context: Callable[[bool, bytes, Ed25519PrivateKey, bytes], ssl.SSLContext]
    """(server, chain PEM, key, root PEM)."""
    check_peer: Callable[[bytes | None, str], None]
    """(peer's leaf in DER, expected name); raises PeerError."""
