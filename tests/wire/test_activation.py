"""Activation frames: golden bytes, every kind there and back, hostile bytes."""

import random

import numpy as np
import pytest

from meshnode.errors import PeerError, StageError
from meshnode.wire import limits
from meshnode.wire.activation import (
    HEADER_BYTES,
    Close,
    Copy,
    FailedFrame,
    Failure,
    Frame,
    Header,
    Heartbeat,
    LaneSample,
    Open,
    Rows,
    SampledFrame,
    Score,
    Trim,
    decode,
    encode,
)
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.rowcodec import Dtype
from meshnode.wire.sampling import CONSTRAINED_TOKENS, GRAMMAR_BYTES, MAX_BIASES, Sampling

FENCE = Fence(Term(7), RunId("0123456789abcdef"))
CHANGES = (Close(3), Open(1, Sampling(temperature=0.5, seed=9), (5, 6), 2), Trim(2, 40), Copy(2, 0, 16))
OPERATIONS = (*CHANGES, Score(1, (7, 0, 2**31 - 1)))


@pytest.fixture(autouse=True)
def overflow_is_no_error_here():
    with np.errstate(all="ignore"):
        yield


def rows_frame(rows=3, width=40, tokens=None, operations=()) -> Rows:
    generator = np.random.default_rng(5)
    activations = None if tokens is not None else generator.normal(0, 3, (rows, width)).astype(np.float32)
    return Rows(
        FENCE,
        12,
        operations,
        range(100, 100 + rows),
        [row % 4 for row in range(rows)],
        [row == rows - 1 for row in range(rows)],
        tokens,
        activations,
    )


def wire(frame: Frame, dtype=Dtype.F16) -> bytes:
    return b"".join(encode(frame, dtype))


def unwire(data: bytes) -> Frame:
    return decode(Header.parse(data[:HEADER_BYTES]), data[HEADER_BYTES:])


def test_golden_bytes_of_a_token_frame_with_operations():
    frame = rows_frame(2, tokens=[17, 4], operations=(Trim(2, 40),))
    expected = (
        "4d4e4146" "01" "01" "01" "00" "0700000000000000" "0123456789abcdef" "0c00000000000000"
        "02000000" "01000000" "1a000000" "08000000"
        "9183a26f70a47472696da46c616e6502a8706f736974696f6e28" "000000000000"
        "6400000000000000" "6500000001000100"
        "1100000004000000"
    )  # fmt: skip
    assert wire(frame).hex() == expected


def test_golden_bytes_of_an_f16_row_hold_the_scaled_halves_and_the_exponent():
    frame = rows_frame(1)
    frame = Rows(FENCE, 1, (), frame.positions, frame.lanes, frame.logits, None, np.array([[1.0, -70000]], np.float32))
    # 70000 / 2^2 = 17500 lies in [2^14, 2^15); the row keeps exponent 2.
    assert wire(frame)[HEADER_BYTES:].hex() == "6400000000000102" + "0034" + "46f4"


def test_golden_bytes_of_a_sample_and_of_a_heartbeat():
    sampled = SampledFrame(FENCE, 12, (LaneSample(1, 5, 300, -0.5, ((300, -0.5),)),))
    assert wire(sampled)[HEADER_BYTES:].hex().startswith("91950105cd012ccbbfe00000000000009192cd012c")
    assert wire(Heartbeat(FENCE, 3)).hex().startswith("4d4e41460104000007000000000000000123456789abcdef03")
    assert len(wire(Heartbeat(FENCE, 3))) == HEADER_BYTES


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(Dtype.F32, 0.0), (Dtype.F16, 2**-11), (Dtype.Q8, 1 / 200)], ids=["f32", "f16", "q8"]
)
@pytest.mark.parametrize(("rows", "width"), [(5, 40), (5, 64), (1, 40), (1, 64)])
def test_activations_come_back_within_the_precision_of_their_dtype(dtype, tolerance, rows, width):
    frame = rows_frame(rows, width, operations=OPERATIONS)
    back = unwire(wire(frame, dtype))
    assert isinstance(back, Rows)
    assert (back.fence, back.microbatch, back.operations) == (FENCE, 12, OPERATIONS)
    assert list(back.positions) == list(frame.positions)
    assert list(back.lanes) == frame.lanes
    assert list(back.logits) == [False] * (rows - 1) + [True]
    assert back.activations.shape == (rows, width)
    largest = np.abs(frame.activations).max(axis=1, keepdims=True)
    assert (np.abs(back.activations - frame.activations) <= tolerance * largest).all()


@pytest.mark.parametrize("dtype", [Dtype.F16, Dtype.Q8])
def test_outliers_beyond_f16_and_rows_of_tiny_values_keep_their_precision(dtype):
    frame = rows_frame(4, 64)
    frame.activations[0] *= 1e6
    frame.activations[1] *= 1e-20
    frame.activations[2] = 0
    frame.activations[3, 1:] = 0
    frame.activations[3, 0] = 3.0e38
    back = unwire(wire(frame, dtype)).activations
    largest = np.abs(frame.activations).max(axis=1, keepdims=True)
    assert (np.abs(back - frame.activations) <= largest / 200).all()
    for index in range(4):
        values = frame.activations[index : index + 1]
        one = Rows(FENCE, 1, (), *(a[:1] for a in (frame.positions, frame.lanes, frame.logits)), None, values)
        assert (unwire(wire(one, dtype)).activations == back[index]).all()


def test_one_row_that_f16_holds_well_travels_without_an_exponent():
    values = np.array([[0.5, -3.0]], np.float32)
    frame = Rows(FENCE, 1, (), [1], [1], [True], None, values)
    assert wire(frame)[HEADER_BYTES:].hex() == "0100000001000100" + "003800c2"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [Dtype.F32, Dtype.F16, Dtype.Q8])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_that_is_not_finite_is_refused_by_both_ends(dtype, value, rows):
    frame = rows_frame(rows, 64)
    frame.activations[-1, 7] = value
    with pytest.raises(StageError) as caught:
        encode(frame, dtype)
    assert caught.value.reason == "non_finite"
    frame.activations[-1, 7] = 0
    data = bytearray(wire(frame, dtype))
    data[-2:] = b"\xff\xff"
    data[-34:-32] = b"\xff\xff"  # the last q8 block's scale
    with pytest.raises(PeerError):
        unwire(bytes(data))


def test_a_large_frame_is_sent_from_the_array_itself():
    frame = rows_frame(512, 512)
    head, payload = encode(frame, Dtype.F32)
    assert np.shares_memory(np.frombuffer(payload, np.float32), frame.activations)
    back = unwire(bytes(head) + bytes(payload))
    assert (back.activations == frame.activations).all()


def test_f32_activations_are_read_without_a_copy():
    data = bytearray(wire(rows_frame(3, 64), Dtype.F32))
    body = data[HEADER_BYTES:]
    back = decode(Header.parse(data[:HEADER_BYTES]), body)
    assert np.shares_memory(back.activations, np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    "frame",
    [
        Heartbeat(FENCE, 9),
        SampledFrame(FENCE, 4, ()),
        SampledFrame(FENCE, 4, (LaneSample(0, 1, 2), LaneSample(1, 8, 5, -0.25, ((5, -0.25), (6, -3.0))))),
        FailedFrame(FENCE, 4, Failure(2, "position_gap", "lane 1 expected 5", (1,), CHANGES)),
    ],
)
def test_frames_without_rows_come_back_equal(frame):
    assert unwire(wire(frame)) == frame


def test_a_frame_of_operations_only_comes_back():
    back = unwire(wire(rows_frame(0, 40, operations=OPERATIONS)))
    assert back.operations == OPERATIONS
    assert len(back.positions) == 0
    assert back.activations is None


def test_the_largest_open_fits_a_frame_and_its_failure():
    sampling = Sampling(grammar="x" * GRAMMAR_BYTES, logit_bias=((2**31 - 1, 0.1),) * MAX_BIASES)
    ids = (2**31 - 1,) * CONSTRAINED_TOKENS
    largest = Open(0, sampling, ids[:4096], CONSTRAINED_TOKENS, 2**31 - 1, ids)
    assert unwire(wire(rows_frame(0, operations=(largest,)))).operations == (largest,)
    failed = FailedFrame(FENCE, 1, Failure(1, "x" * 64, "é" * 1024, tuple(range(64)), (largest,)))
    assert unwire(wire(failed)) == failed


@pytest.mark.parametrize(
    "operation",
    [
        Open(limits.LANES, Sampling()),
        Open(0, Sampling(temperature=-1.0)),
        Open(0, Sampling(top_p=float("nan"))),
        Open(0, Sampling(), (-1,)),
        Open(0, Sampling(), (1,) * 4097),
        Open(0, Sampling(), (), -1),
        Open(0, Sampling(grammar="x" * (GRAMMAR_BYTES + 1))),
        Open(0, Sampling(grammar="x"), (), 2, 0, (5,)),
        Open(0, Sampling(grammar="x"), (), 1, 0, (-5,)),
        Open(0, Sampling(grammar="x"), (), CONSTRAINED_TOKENS + 1, 0, (1,) * (CONSTRAINED_TOKENS + 1)),
        Trim(0, -1),
        Trim(-1, 0),
        Copy(1, 1, 5),
        Copy(1, 2, -5),
        Close(2**20),
        Score(limits.LANES, ()),
        Score(0, (-1,)),
        Score(0, (2**31,)),
        Score(0, (1,) * (limits.SCORED_ROWS + 1)),
    ],
)
def test_an_impossible_lane_operation_is_refused(operation):
    with pytest.raises(PeerError):
        unwire(wire(rows_frame(1, operations=(operation,))))


def test_more_operations_than_lanes_could_need_are_refused():
    with pytest.raises(PeerError):
        unwire(wire(rows_frame(1, operations=(Close(0),) * (limits.LANE_OPERATIONS + 1))))


@pytest.mark.parametrize(
    "sample", [LaneSample(0, -1, 2), LaneSample(0, 1, -2), LaneSample(0, 1, 2, float("nan")), LaneSample(0, 1, 2, 0.5)]
)
def test_an_impossible_sample_is_refused(sample):
    with pytest.raises(PeerError):
        unwire(wire(SampledFrame(FENCE, 4, (sample,))))


def header_with(offset: int, value: bytes, frame: Frame | None = None) -> bytes:
    data = bytearray(wire(frame or rows_frame(2))[:HEADER_BYTES])
    data[offset : offset + len(value)] = value
    return bytes(data)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        header_with(0, b"HTTP"),
        header_with(4, b"\x02"),
        header_with(5, b"\x00"),
        header_with(6, b"\x09"),
        header_with(6, b"\x03"),  # another dtype than the lengths say
        header_with(32, b"\xff\xff\xff\xff"),
        header_with(36, b"\xff\xff\xff\xff"),
        header_with(40, b"\xff\xff\xff\xff"),
        header_with(44, b"\x01"),
        header_with(32, b"\x01", Heartbeat(FENCE)),
        wire(Heartbeat(FENCE))[:-1],
    ],
)
def test_a_header_that_contradicts_itself_or_passes_a_limit_is_refused_before_a_body_is_read(header):
    with pytest.raises(PeerError):
        Header.parse(header)


def test_a_truncated_or_longer_body_is_refused():
    data = wire(rows_frame(2))
    for body in (data[HEADER_BYTES:-1], data[HEADER_BYTES:] + b"\0", b""):
        with pytest.raises(PeerError):
            decode(Header.parse(data[:HEADER_BYTES]), body)


def test_ten_thousand_mutated_frames_are_frames_or_peer_errors():
    generator = random.Random(11)
    corpus = [
        wire(rows_frame(3, operations=OPERATIONS), dtype) for dtype in (Dtype.F16, Dtype.F32, Dtype.Q8)
    ] + [
        wire(rows_frame(3, tokens=[1, 2, 3], operations=OPERATIONS)),
        wire(SampledFrame(FENCE, 4, (LaneSample(0, 1, 2, -0.5, ((5, -0.25),)),))),
        wire(FailedFrame(FENCE, 4, Failure(2, "x", "y", (1,), CHANGES))),
        wire(Heartbeat(FENCE)),
    ]  # fmt: skip
    survived = 0
    for _ in range(10_000):
        data = bytearray(generator.choice(corpus))
        for _ in range(generator.randint(1, 4)):
            match generator.randrange(4):
                case 0 if len(data) > 1:
                    del data[generator.randrange(len(data)) :]
                case 1:
                    data.insert(generator.randrange(len(data) + 1), generator.randrange(256))
                case _ if data:
                    data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            unwire(bytes(data))
            survived += 1
        except PeerError:
            pass
    assert 0 < survived < 9_000
