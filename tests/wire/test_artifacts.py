import random

import msgspec
import pytest

from meshnode.errors import PeerError
from meshnode.wire.artifacts import (
    CHUNK_BYTES,
    Chunk,
    GetArtifact,
    GetManifest,
    Refused,
    Sample,
    Sending,
    decode_reply,
    decode_request,
    encode,
)

DIGEST = "0123456789abcdef" * 4
REQUESTS = [
    GetManifest(DIGEST),
    GetArtifact(DIGEST, "layer.12", 5, 100),
    GetArtifact(DIGEST, "embedding", 0, 1 << 40),
    Sample(5),
]
REPLIES = [Sending(1 << 40), Chunk(CHUNK_BYTES), Refused("no_artifact")]


def test_messages_survive_the_wire():
    assert [decode_request(encode(message)) for message in REQUESTS] == REQUESTS
    assert [decode_reply(encode(message)) for message in REPLIES] == REPLIES


def test_the_literal_bytes_of_a_request():
    assert msgspec.msgpack.decode(encode(REQUESTS[1])) == {
        "op": "get_artifact",
        "digest": DIGEST,
        "artifact": "layer.12",
        "offset": 5,
        "length": 100,
    }


def test_unknown_fields_are_ignored_and_an_unknown_op_is_answered():
    later = {"op": "get_manifest", "digest": DIGEST, "compress": True}
    assert decode_request(msgspec.msgpack.encode(later)) == REQUESTS[0]
    assert decode_request(msgspec.msgpack.encode({"op": "get_everything"})) == Refused("unknown_op")


@pytest.mark.parametrize(
    "changed",
    [
        {"digest": DIGEST[:-1]},
        {"digest": DIGEST + "\n"},
        {"digest": "../" + DIGEST[3:]},
        {"artifact": "../../etc/passwd"},
        {"artifact": "layer.1\n"},
        {"artifact": ""},
        {"offset": -1},
        {"offset": 1 << 63},
        {"length": 0},
        {"length": 1 << 51},
        {"offset": "5"},
    ],
)
def test_impossible_requests_are_refused(changed):
    request = {"op": "get_artifact", "digest": DIGEST, "artifact": "layer.12", "offset": 5, "length": 100} | changed
    with pytest.raises(PeerError):
        decode_request(msgspec.msgpack.encode(request))


def test_a_chunk_is_never_longer_than_agreed():
    with pytest.raises(PeerError):
        decode_reply(encode(Chunk(CHUNK_BYTES + 1)))


def test_10_000_mutated_frames_end_in_a_message_or_a_peer_error():
    draw = random.Random(1)
    frames = [encode(message) for message in (*REQUESTS, *REPLIES)]
    for _ in range(10_000):
        data = bytearray(draw.choice(frames))
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        data = data[: draw.randint(0, len(data))] if draw.random() < 0.2 else data
        for decode in (decode_request, decode_reply):
            try:
                decode(bytes(data))
            except PeerError:
                pass
