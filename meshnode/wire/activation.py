"""The frame of an activation stream: what head and stages say to each other for every microbatch.

    header (48 bytes) | meta (MessagePack, zero-padded to 8) | row table (8 bytes a row) | payload

    ROWS       head -> stage 0 (token ids), stage -> next stage (activations)
    SAMPLED    last stage -> head: what was drawn or scored at the rows flagged `logits`; the receipt of others
    FAILED     instead of ROWS or SAMPLED: this microbatch was not computed; runs through all later stages to the head
    HEARTBEAT  header only: the greeting of both ends, and a sign of life

Invariants: exactly one SAMPLED or FAILED reaches the head for every ROWS it sent, in order. Microbatch numbers count
1, 2, 3, ... on every hop of a run; a heartbeat repeats the last one. Lane operations happen before the rows of their
frame, also when the frame is a FAILED one, so every stage sees the same order. docs/protocols/activation.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from itertools import repeat
from typing import Final

import msgspec
import numpy as np

from meshnode.errors import PeerError
from meshnode.wire import limits
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.rowcodec import Dtype, Floats, pack, payload_bytes, unpack
from meshnode.wire.sampling import CONSTRAINED_TOKENS, MAX_TOP, Sampling

MAGIC: Final = b"MNAF"
VERSION: Final = 1
_HEADER: Final = struct.Struct("<4sBBBxQ8sQIIII")
HEADER_BYTES: Final = _HEADER.size
_ROW: Final = struct.Struct("<iHBb")
"""Position, lane, flags, exponent. Numbers of rows stay numbers of Python: an array of one costs 2 us to make with cold
caches and 1 us to ask, and a chunk of 512 rows, which takes a second to compute, costs 0.1 ms."""
_FLAG_LOGITS: Final = 1

META_BYTES: Final = 512 * limits.KIB
"""Lane operations, samples or a failure. One Open takes at most 34 KiB (4096 window ids, 1024 biases), so that a frame
holds 14 of the largest kind and all 64 lanes of the usual one; with a grammar (64 KiB) and the 65,536 ids that were
generated under it 418 KiB: a frame of the head holds one Open. 512 samples of 20 alternatives take 170 KiB."""
INLINE_BYTES: Final = 64 * limits.KIB
"""Up to here one joined buffer is cheaper than several sends; a single decode row is far below."""
MAX_WINDOW: Final = 4096
"""Prompt ids that an Open carries: Sampling.penalty_window's own bound."""
_POSITIONS: Final = 2**31 - 1


class Kind(IntEnum):
    """What a frame is; numbers are wire values."""

    ROWS = 1
    SAMPLED = 2
    FAILED = 3
    HEARTBEAT = 4


class LaneOperation(msgspec.Struct, frozen=True, tag_field="op", tag=str.lower):
    """Something a stage does to a lane before it computes the rows of the frame."""


class Open(LaneOperation, frozen=True, omit_defaults=True):
    """Set up the lane's sampler and keep only its first `keep` positions; the next row has position `keep`."""

    lane: int
    sampling: Sampling
    window: tuple[int, ...] = ()
    """The last ids before the next draw (prompt, and what was generated already) that the penalties see."""
    generated: int = 0
    """How many ids were generated before: the draw of the next one is number `generated`."""
    keep: int = 0
    """0: a fresh lane. Otherwise a prefix that a former request (or a Copy in front of this) left there."""
    accepted: tuple[int, ...] = ()
    """All ids that were generated before, where the sampling has a grammar: they are where in it the answer stands."""


class Trim(LaneOperation, frozen=True):
    """Forget everything at `position` and beyond; the next row of the lane has that position. Samplers are not touched:
    to take drawn tokens back, Open with `keep`."""

    lane: int
    position: int


class Copy(LaneOperation, frozen=True):
    """`target`'s cache becomes the first `length` positions of `source`'s; samplers are not copied."""

    source: int
    target: int
    length: int


class Close(LaneOperation, frozen=True):
    """Clear the lane; rows for it are refused until the next Open."""

    lane: int


class Score(LaneOperation, frozen=True):
    """The tokens that follow this frame's first rows of `lane` with flag `logits`: the last stage answers such a row
    with the log-probability of that token and draws nothing. It changes no lane, and holds for this frame only."""

    lane: int
    targets: tuple[int, ...]


Change = Open | Trim | Copy | Close
AnyOperation = Change | Score


def changes_of(operations: tuple[AnyOperation, ...]) -> tuple[Change, ...]:
    """What has to be done to lanes whether or not the rows of the frame are computed."""
    return tuple(each for each in operations if not isinstance(each, Score))


class LaneSample(msgspec.Struct, frozen=True, array_like=True):
    """What was drawn (or scored) after the row (lane, position); `token` will sit, or sits, at position + 1. Natural
    log-probabilities."""

    lane: int
    position: int
    token: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    """(token, log-probability), most likely first."""


class Failure(msgspec.Struct, frozen=True):
    """Why a microbatch was not computed."""

    stage: int
    reason: str
    """Machine-readable (docs/protocols/stage.md)."""
    message: str
    lanes: tuple[int, ...]
    """The lanes at fault: broken on `stage` until their next Open, Trim or Close. Others of the microbatch may be
    trimmed back and sent again."""
    operations: tuple[Change, ...] = ()
    """The changes of lanes in the frame that failed: later stages still have to do them."""


class Rows(msgspec.Struct, frozen=True, eq=False):
    """One microbatch. Sequences have one entry a row; `tokens` or `activations` (rows, width), never both.

    A frame may have no rows: then only its operations count.
    """

    fence: Fence
    microbatch: int
    operations: tuple[AnyOperation, ...]
    positions: Sequence[int]
    lanes: Sequence[int]
    logits: Sequence[bool]
    tokens: Sequence[int] | None = None
    activations: Floats | None = None


class SampledFrame(msgspec.Struct, frozen=True):
    """What the last stage drew for a microbatch, in the order of its rows flagged `logits`."""

    fence: Fence
    microbatch: int
    samples: tuple[LaneSample, ...]


class FailedFrame(msgspec.Struct, frozen=True):
    """A microbatch that some stage could not compute."""

    fence: Fence
    microbatch: int
    failure: Failure


class Heartbeat(msgspec.Struct, frozen=True):
    """Sign of life; `microbatch` is the last one that its sender sent, 0 before the first."""

    fence: Fence
    microbatch: int = 0


Frame = Rows | SampledFrame | FailedFrame | Heartbeat


class Header(msgspec.Struct, frozen=True):
    """The fixed part of a frame, every number checked against its limit."""

    kind: Kind
    dtype: Dtype
    fence: Fence
    microbatch: int
    rows: int
    width: int
    meta_bytes: int
    body_bytes: int
    """Bytes behind the header."""

    @staticmethod
    def parse(data: bytes | bytearray | memoryview) -> Header:
        """Read HEADER_BYTES bytes. Raises PeerError."""
        if len(data) != HEADER_BYTES:
            raise PeerError("an activation frame was cut off in its header")
        magic, version, kind, dtype, term, run, microbatch, rows, width, meta, payload = _HEADER.unpack(data)
        if magic != MAGIC or version != VERSION:
            raise PeerError("not an activation frame of this version")
        kind, dtype = _KINDS.get(kind), _DTYPES.get(dtype)
        if kind is None or dtype is None:
            raise PeerError("an activation frame of unknown kind or dtype")
        if rows > limits.MICROBATCH_ROWS or width > limits.ACTIVATION_WIDTH or meta > META_BYTES:
            raise PeerError(f"an activation frame of {rows} rows x {width} and {meta} bytes passes the limits")
        if payload != payload_bytes(dtype, rows, width) or not _consistent(kind, dtype, rows, width, meta):
            raise PeerError("the lengths in an activation frame's header contradict each other")
        body = (meta and _padded(meta)) + rows * _ROW.size + payload
        return Header(kind, dtype, _fence(term, run), microbatch, rows, width, meta, body)


_KINDS: Final = {int(kind): kind for kind in Kind}
_DTYPES: Final = {int(dtype): dtype for dtype in Dtype}


# Every frame of a stream has the same fence; four are more than the streams of a process have.
@lru_cache(maxsize=4)
def _fence(term: int, run: bytes) -> Fence:
    return Fence(Term(term), RunId(run.hex()))


def _consistent(kind: Kind, dtype: Dtype, rows: int, width: int, meta: int) -> bool:
    if rows:
        fits = width == 1 if dtype is Dtype.TOKENS else width > 0 and dtype is not Dtype.NONE
        return fits and kind is Kind.ROWS
    if width or dtype is not Dtype.NONE:
        return False
    return kind is Kind.ROWS or (meta > 0) is (kind is not Kind.HEARTBEAT)


_encoder = msgspec.msgpack.Encoder()
_operations = msgspec.msgpack.Decoder(tuple[AnyOperation, ...])
_samples = msgspec.msgpack.Decoder(tuple[LaneSample, ...])
_failure = msgspec.msgpack.Decoder(Failure)


def encode(frame: Frame, dtype: Dtype = Dtype.F16) -> list[bytes | memoryview]:
    """The buffers to send, in order; one alone while the frame is small. `dtype` is for activations.

    A memoryview aliases the frame's own arrays (f32): send it before they change.
    Raises StageError("non_finite") for activations that are not finite.
    """
    match frame:
        case Rows():
            return _encode_rows(frame, dtype)
        case SampledFrame():
            return [_head(Kind.SAMPLED, frame, _encoder.encode(frame.samples))]
        case FailedFrame():
            return [_head(Kind.FAILED, frame, _encoder.encode(frame.failure))]
        case Heartbeat():
            return [_head(Kind.HEARTBEAT, frame)]


def _encode_rows(frame: Rows, dtype: Dtype) -> list[bytes | memoryview]:
    meta = _encoder.encode(frame.operations) if frame.operations else b""
    rows = len(frame.positions)
    if not rows:
        return [_head(Kind.ROWS, frame, meta)]
    columns = (frame.positions, frame.lanes, frame.logits)
    if frame.tokens is not None:
        payload = struct.pack(f"<{rows}i", *frame.tokens)
        head = _head(Kind.ROWS, frame, meta, (Dtype.TOKENS, rows, 1, len(payload)))
        return [b"".join((head, *map(_ROW.pack, *columns, repeat(0)), payload))]
    assert frame.activations is not None, "rows need tokens or activations"
    values, exponents = pack(frame.activations, dtype)
    head = _head(Kind.ROWS, frame, meta, (dtype, rows, frame.activations.shape[1], values.nbytes))
    head = b"".join((head, *map(_ROW.pack, *columns, exponents)))
    if len(head) + values.nbytes <= INLINE_BYTES:
        return [b"".join((head, values.data))]
    return [head, values.reshape(-1).view(np.uint8).data]


def _head(
    kind: Kind, frame: Frame, meta: bytes = b"", shape: tuple[Dtype, int, int, int] = (Dtype.NONE, 0, 0, 0)
) -> bytes:
    """The header and its meta. `shape`: dtype, rows, width, and the bytes that they make."""
    dtype, rows, width, size = shape
    assert rows <= limits.MICROBATCH_ROWS, "more rows than a microbatch may have"
    assert len(meta) <= META_BYTES, "the operations of this frame must be spread over several"
    run = bytes.fromhex(frame.fence.run)
    head = _HEADER.pack(
        MAGIC, VERSION, kind, dtype, frame.fence.term, run, frame.microbatch, rows, width, len(meta), size
    )
    return head + meta.ljust(_padded(len(meta)), b"\0") if meta else head


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def decode(header: Header, body: bytes | bytearray | memoryview) -> Frame:
    """The frame behind `header`; f32 activations alias `body`. Raises PeerError and nothing else."""
    view = memoryview(body)
    if view.nbytes != header.body_bytes:
        raise PeerError("an activation frame was cut off")
    meta = view[: header.meta_bytes]
    fence, microbatch = header.fence, header.microbatch
    try:
        match header.kind:
            case Kind.ROWS:
                if not header.meta_bytes:
                    return _decode_rows(header, view, ())
                operations = _checked_operations(_operations.decode(meta))
                return _decode_rows(header, view[_padded(header.meta_bytes) :], operations)
            case Kind.HEARTBEAT:
                return Heartbeat(fence, microbatch)
            case Kind.SAMPLED:
                return SampledFrame(fence, microbatch, _checked_samples(_samples.decode(meta)))
            case Kind.FAILED:
                return FailedFrame(fence, microbatch, _checked_failure(_failure.decode(meta)))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        # The text names types and fields only; values (ids of a prompt) are left out.
        raise PeerError(f"malformed activation frame: {type(error).__name__}") from None


def _decode_rows(header: Header, view: memoryview, operations: tuple[AnyOperation, ...]) -> Rows:
    if not header.rows:
        return Rows(header.fence, header.microbatch, operations, (), (), ())
    edge = header.rows * _ROW.size
    positions, lanes, flags, exponents = zip(*_ROW.iter_unpack(view[:edge]), strict=True)
    if min(positions) < 0 or max(lanes) >= limits.LANES:
        raise PeerError("an activation frame names an impossible position or lane")
    logits = [flag & _FLAG_LOGITS == 1 for flag in flags]
    if header.dtype is not Dtype.TOKENS:
        activations = unpack(view[edge:], header.dtype, header.width, exponents)
        return Rows(header.fence, header.microbatch, operations, positions, lanes, logits, None, activations)
    tokens = struct.unpack(f"<{header.rows}i", view[edge:])
    if min(tokens) < 0:
        raise PeerError("an activation frame holds a negative token id")
    return Rows(header.fence, header.microbatch, operations, positions, lanes, logits, tokens)


def _checked_operations(operations: tuple[AnyOperation, ...]) -> tuple[AnyOperation, ...]:
    _require(len(operations) <= limits.LANE_OPERATIONS, "too many lane operations")
    for operation in operations:
        match operation:
            case Open(lane, sampling, window, generated, keep, accepted):
                _require(_is_lane(lane) and 0 <= generated <= _POSITIONS and 0 <= keep <= _POSITIONS, "a bad Open")
                _require(len(window) <= MAX_WINDOW and all(0 <= t <= _POSITIONS for t in window), "a bad window")
                _require(not sampling.defect(), "impossible sampling parameters")
                _require(len(accepted) in (0, generated) and all(0 <= t <= _POSITIONS for t in accepted), "a bad Open")
                _require(len(accepted) <= CONSTRAINED_TOKENS, "a bad Open")
            case Trim(lane, position):
                _require(_is_lane(lane) and 0 <= position <= _POSITIONS, "a Trim out of range")
            case Copy(source, target, length):
                _require(_is_lane(source) and _is_lane(target) and source != target, "a Copy out of range")
                _require(0 <= length <= _POSITIONS, "a Copy out of range")
            case Close(lane):
                _require(_is_lane(lane), "a Close out of range")
            case Score(lane, targets):
                _require(_is_lane(lane) and len(targets) <= limits.SCORED_ROWS, "a bad Score")
                _require(all(0 <= t <= _POSITIONS for t in targets), "a bad Score")
    return operations


def _checked_samples(samples: tuple[LaneSample, ...]) -> tuple[LaneSample, ...]:
    _require(len(samples) <= limits.MICROBATCH_ROWS, "more samples than rows")
    for lane, position, token, logprob, alternatives in map(msgspec.structs.astuple, samples):
        fits = 0 <= lane < limits.LANES and 0 <= position < _POSITIONS and 0 <= token <= _POSITIONS
        if not fits or len(alternatives) > MAX_TOP or not (logprob is None or logprob <= 0):
            raise PeerError("an activation frame with a sample out of range")
        for alternative, likely in alternatives:
            _require(0 <= alternative <= _POSITIONS and likely <= 0, "a bad alternative")
    return samples


def _checked_failure(failure: Failure) -> Failure:
    _require(0 <= failure.stage < limits.STAGES, "a failure of an impossible stage")
    _require(len(failure.reason) <= 64 and len(failure.message) <= 1024, "a failure too long to be one")
    _require(len(failure.lanes) <= limits.LANES and all(map(_is_lane, failure.lanes)), "a failure of impossible lanes")
    _checked_operations(failure.operations)
    return failure


def _is_lane(lane: int) -> bool:
    return 0 <= lane < limits.LANES


def _require(holds: bool, defect: str) -> None:
    if not holds:
        raise PeerError(f"an activation frame with {defect}")
