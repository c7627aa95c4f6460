"""How long a token takes: on a node, over a hop, back to the head. Integers only.

    token = enter + sum(stage) + sum(hop) + back
    stage = bytes read / decode_bytes_per_s + layers x layer_us + stage_us
    hop   = rtt / 2 + frame bytes / bytes_per_s

Invariant: a stage's time is a sum over its layers plus a constant, with no rounding in between: cuts that move layers
between equally fast nodes give exactly equal sums, and the tie-breaks decide, not the noise of a division.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from meshnode.core.planning.context import layer_kv_bytes
from meshnode.core.planning.footprint import ModelFootprint
from meshnode.core.planning.inventory import LinkInventory, NodeInventory
from meshnode.identity.ids import NodeId
from meshnode.wire.limits import STAGES

Matrix = npt.NDArray[np.int64]

# --- assumed where nothing was measured ---------------------------------------------------------------------------

ASSUMED_DECODE_BYTES_PER_S = 10_000_000_000
"""What llama.cpp gets from two channels of DDR4 (25 to 40 GB/s by data sheet) with a laptop's cores: a third."""

ASSUMED_PREFILL_BYTES_PER_S = 80_000_000_000
"""Times rows: a chunk is computed about eight times as fast a row as one row alone (measured: 500 and 70 rows a second
of a 0.3 GB model on 2 cores)."""

ASSUMED_RTT_US = 1_000
"""Between programs on a home network: 0.3 ms by cable, 2 to 5 ms by Wi-Fi."""

ASSUMED_BYTES_PER_S = 12_500_000
"""100 Mbit/s: the slowest cable still sold, and ordinary Wi-Fi."""

STEP_US = 600
"""Assumed of a stage's step beside its layers: frames in and out, the wake-up of a process, Python (300
of it); measured over loopback with two and three stages on 2 cores."""

# --- what is predicted --------------------------------------------------------------------------------------------

REFERENCE_TOKENS = 1024
"""Conversations are judged at this length: so much KV is read a token. Longer ones read more on every placement."""

SMALL_FRAME_BYTES = 256
"""A frame of tokens or samples, and what stands around the values of an activation: header, meta, TLS record."""

VALUE_BYTES = 2
"""Activations travel as f16."""

CHUNK_ROWS = 128
"""Rows of a prefill chunk (SERVING); the prediction of prefill is for one of them."""

# --- the unit -----------------------------------------------------------------------------------------------------

NEVER = 1 << 60
"""No way. Four of them still fit 64 bits."""

_FS_PER_S = 10**15
_FS_PER_US = 10**9
_BYTES_PER_S = (10**6, 10**14)  # believed of a peer's number: 1 MB/s to 100 TB/s
_US_MAX = 10_000_000  # believed of a delay: ten seconds


@dataclass(frozen=True)
class Tempo:
    """One node, in ticks."""

    byte: int
    layer: int
    step: int


class Pace:
    """Times of one model on given nodes (by index) with a given head. Unit: a tick, `2^shift` femtoseconds.

    `home` is the index of the head's node, `len(nodes)` where it takes no layers; None: the head is where stage 0 is.
    """

    def __init__(
        self,
        footprint: ModelFootprint,
        caches: Sequence[int],
        nodes: Sequence[NodeInventory],
        author: NodeId | None,
        links: Iterable[LinkInventory],
    ) -> None:
        layers = [
            (layer.read_bytes or layer.weight_bytes) + 2 * layer.state_bytes + cache  # state is read and written
            for layer, cache in zip(footprint.layers, caches, strict=True)
        ]
        self.reads = tuple(accumulate(layers, initial=0))
        self.shared = footprint.shared_bytes
        self.output = footprint.output_bytes
        self.nodes = nodes
        ids = [node.node for node in nodes]
        self.home = None if author is None else ids.index(author) if author in ids else len(ids)
        self._everybody = [*ids, author] if self.home == len(ids) and author is not None else ids
        delays, byte = _links(self._everybody, links)
        self.shift = self._shift(footprint, nodes)
        self.tempos = tuple(self._tempo(node) for node in nodes)
        self.forward = self._ticks(delays, byte, SMALL_FRAME_BYTES + VALUE_BYTES * footprint.width)
        self.small = self._ticks(delays, byte, SMALL_FRAME_BYTES)

    def _shift(self, footprint: ModelFootprint, nodes: Sequence[NodeInventory]) -> int:
        """So that no sum of one pipeline comes near `NEVER`."""
        slowest = max((_fs_per_byte(node.decode_bytes_per_s) for node in nodes), default=1)
        layer = max((min(node.layer_us, _US_MAX) for node in nodes), default=0)
        stages = min(STAGES, len(footprint.layers))
        read = (self.reads[-1] + self.output + self.shared * stages) * slowest
        frame = (SMALL_FRAME_BYTES + VALUE_BYTES * footprint.width) * _FS_PER_S // _BYTES_PER_S[0]
        hops = (stages + 1) * (frame + 2 * _US_MAX * _FS_PER_US)
        total = read + layer * len(footprint.layers) * _FS_PER_US + hops
        return max(0, total.bit_length() - (NEVER.bit_length() - 2))

    def _tempo(self, node: NodeInventory) -> Tempo:
        layer = min(max(0, node.layer_us), _US_MAX) * _FS_PER_US >> self.shift
        byte = max(1, _fs_per_byte(node.decode_bytes_per_s) >> self.shift)
        step = min(max(0, node.stage_us) or STEP_US, _US_MAX) * _FS_PER_US >> self.shift
        return Tempo(byte, layer, step)

    def _ticks(self, delays: Matrix, byte: Matrix, frame: int) -> Matrix:
        times = delays * (_FS_PER_US // 2) + byte * frame >> self.shift
        times[delays < 0] = NEVER
        np.fill_diagonal(times, 0)
        return times

    def read(self, first: int, last: int) -> int:
        """Bytes that a stage of layers [first, last) reads a token."""
        total = self.reads[last] - self.reads[first] + self.shared
        return total + self.output if last == len(self.reads) - 1 else total

    def stage(self, node: int, first: int, last: int) -> int:
        """Ticks of one stage and token."""
        tempo = self.tempos[node]
        return self.read(first, last) * tempo.byte + (last - first) * tempo.layer + tempo.step

    def hop(self, source: int, target: int) -> int:
        """Ticks of one row of activations."""
        return int(self.forward[source, target])

    def enter(self, first: int) -> int:
        """Ticks of a token from the head to stage 0."""
        return 0 if self.home is None else int(self.small[self.home, first])

    def back(self, last: int, first: int) -> int:
        """Ticks of a sample from the last stage to the head."""
        return int(self.small[last, first if self.home is None else self.home])

    def total(self, order: Sequence[int], ends: Sequence[int]) -> int:
        """Ticks of a token through a whole pipeline; NEVER or more where a hop is not possible."""
        starts = (0, *ends[:-1])
        stages = sum(self.stage(*stage) for stage in zip(order, starts, ends, strict=True))
        hops = sum(self.hop(a, b) for a, b in pairwise(order))
        return self.enter(order[0]) + stages + hops + self.back(order[-1], order[0])

    def least(self, stages: int) -> int:
        """No pipeline of so many stages takes fewer ticks."""
        byte = min(tempo.byte for tempo in self.tempos)
        layers = self.reads[-1] * byte + (len(self.reads) - 1) * min(tempo.layer for tempo in self.tempos)
        each = self.shared * byte + min(tempo.step for tempo in self.tempos)
        count = len(self.nodes)
        apart = self.forward[:count, :count][~np.eye(count, dtype=bool)]
        nearest = int(apart.min()) if count > 1 else 0
        return layers + self.output * byte + stages * each + (stages - 1) * nearest

    def cut_off(self) -> bool:
        """Whether some node cannot reach some other."""
        return bool((self.forward >= NEVER).any())

    def microseconds(self, ticks: int) -> int:
        """For people, rounded down."""
        return (ticks << self.shift) // _FS_PER_US


def pace_of(
    footprint: ModelFootprint,
    context: int,
    kv_type: str,
    nodes: Sequence[NodeInventory],
    seen_from: tuple[NodeId | None, Iterable[LinkInventory]],
) -> Pace:
    """Times at a conversation of REFERENCE_TOKENS, or of `context` where that is shorter; seen from (head, links)."""
    caches = layer_kv_bytes(footprint, min(context, REFERENCE_TOKENS), kv_type)
    return Pace(footprint, caches, nodes, *seen_from)


def chunk_us(node: NodeInventory, read: int) -> int:
    """Microseconds of CHUNK_ROWS rows through a stage that reads `read` bytes."""
    speed = _believed(node.prefill_bytes_per_s or ASSUMED_PREFILL_BYTES_PER_S)
    return read * CHUNK_ROWS * 1_000_000 // speed + (min(max(0, node.stage_us), _US_MAX) or STEP_US)


def _believed(bytes_per_s: int) -> int:
    return min(max(bytes_per_s, _BYTES_PER_S[0]), _BYTES_PER_S[1])


def _fs_per_byte(bytes_per_s: int) -> int:
    return _FS_PER_S // _believed(bytes_per_s or ASSUMED_DECODE_BYTES_PER_S)


def _links(nodes: Sequence[NodeId], links: Iterable[LinkInventory]) -> tuple[Matrix, Matrix]:
    """Round trips in microseconds (-1: no way) and femtoseconds a byte, [source, target]."""
    count = len(nodes)
    delays = np.full((count, count), ASSUMED_RTT_US, np.int64)
    byte = np.full((count, count), _FS_PER_S // ASSUMED_BYTES_PER_S, np.int64)
    index = {node: number for number, node in enumerate(nodes)}
    known = sorted(
        (link for link in links if link.source in index and link.target in index and link.source != link.target),
        key=lambda link: (link.source, link.target, link.rtt_us, link.bytes_per_s, link.reachable),
    )
    for link in known:  # a round trip is the same from either end, unless both ends measured it
        if link.rtt_us > 0:
            delays[index[link.target], index[link.source]] = min(link.rtt_us, _US_MAX)
    for link in known:
        pair = index[link.source], index[link.target]
        if link.rtt_us > 0:
            delays[pair] = min(link.rtt_us, _US_MAX)
        if link.bytes_per_s > 0:
            byte[pair] = _FS_PER_S // _believed(link.bytes_per_s)
    for link in known:
        if not link.reachable:
            delays[index[link.source], index[link.target]] = -1
    return delays, byte
