from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import PeerError
from meshnode.wire.framing import FrameDecoder, encode_frame
from tests.identity.mutate import mutations

LIMIT = 64


@given(st.lists(st.binary(max_size=LIMIT), max_size=8), st.integers(1, 20))
def test_frames_come_out_as_they_went_in_however_they_are_cut(frames: list[bytes], piece: int) -> None:
    data = b"".join(encode_frame(frame, LIMIT) for frame in frames)
    decoder, seen = FrameDecoder(LIMIT), []
    for at in range(0, len(data), piece):
        decoder.feed(data[at : at + piece])
        while (frame := decoder.next_frame()) is not None:
            seen.append(frame)
    assert seen == frames
    assert len(decoder) == 0


def test_the_bytes_of_a_frame_are_fixed() -> None:
    assert encode_frame(b"abc", LIMIT) == b"\0\0\0\x03abc"


def test_a_length_beyond_the_limit_is_refused_before_its_bytes_arrive() -> None:
    decoder = FrameDecoder(LIMIT)
    decoder.feed((LIMIT + 1).to_bytes(4, "big"))
    with pytest.raises(PeerError, match="at most 64"):
        decoder.next_frame()


def test_sending_beyond_the_limit_is_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        encode_frame(bytes(LIMIT + 1), LIMIT)


def test_raw_bytes_between_frames_are_taken_as_they_are() -> None:
    decoder = FrameDecoder(LIMIT)
    decoder.feed(encode_frame(b"5 raw", LIMIT) + b"12345" + encode_frame(b"next", LIMIT))
    assert decoder.next_frame() == b"5 raw"
    assert decoder.take(3) + decoder.take(2) == b"12345"
    assert decoder.next_frame() == b"next"
    assert decoder.take(9) == b""


def test_damaged_streams_end_in_frames_waiting_or_peer_errors() -> None:
    draw = random.Random(2)
    sample = b"".join(encode_frame(draw.randbytes(draw.randint(0, LIMIT)), LIMIT) for _ in range(4))
    for data in mutations([sample]):
        decoder = FrameDecoder(LIMIT)
        decoder.feed(data)
        try:
            while (frame := decoder.next_frame()) is not None:
                assert len(frame) <= LIMIT
        except PeerError:
            continue
        assert len(decoder) < LIMIT + 4
