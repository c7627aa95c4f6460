"""Messages between a node and its stage process: literal bytes, growth in both directions, hostile bytes."""

import random

import msgpack
import pytest

from meshnode.errors import PeerError
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.messages import RunOptions
from meshnode.wire.stage_protocol import (
    LENGTH_BYTES,
    MESSAGE_BYTES,
    Accepted,
    Adopt,
    Bye,
    Cancel,
    Connect,
    Connected,
    Credentials,
    Done,
    Error,
    Event,
    Load,
    Loaded,
    LoadStage,
    Ping,
    Pong,
    Prepare,
    Prepared,
    Progress,
    Shutdown,
    Statistics,
    Stats,
    Unknown,
    Unload,
    body_length,
    decode_reply,
    decode_request,
    encode,
)

FENCE = Fence(Term(3), RunId("00112233445566ff"))
OPTIONS = RunOptions(context=512, lanes=4, chunk=128, kv_type="q8_0", flash_attention=True)
WHAT = LoadStage(
    slice_path="/a", embedding_path="/b", stage=0, stages=2, first=0, last=4, layer_count=8, options=OPTIONS
)

REQUESTS = [
    Ping(id=1),
    Prepare(id=2),
    Credentials(id=3, chain=b"c", root=b"r", upstream_name="u", downstream_name="d", fence=FENCE),
    Adopt(id=3, chain=b"c", root=b"r", upstream_name="u", downstream_name="d", fence=FENCE, stage=1, stages=2),
    Load(id=4, what=WHAT),
    Cancel(id=5),
    Connect(id=6, side="upstream"),
    Stats(id=7),
    Unload(id=8),
    Shutdown(id=9),
]
REPLIES = [
    Pong(id=1, protocol=1, build="b", state="empty"),
    Prepared(id=2, public_key=b"k"),
    Done(id=3),
    Accepted(id=4),
    Progress(id=4, fraction=0.5),
    Loaded(id=4, width=8, vocabulary=9, trim_any=True, fingerprint="f", memory_bytes={"kv": 5}),
    Connected(id=6, side="upstream"),
    Statistics(id=7, cost_us={1: 900}),
    Error(id=8, kind="not_loaded", message="no"),
    Event(kind="neighbour_lost", message="closed", side="upstream"),
    Bye(id=9),
]


@pytest.mark.parametrize("message", REQUESTS, ids=lambda m: type(m).__name__)
def test_every_request_comes_back_equal(message):
    data = encode(message)
    assert body_length(data[:LENGTH_BYTES]) == len(data) - LENGTH_BYTES
    assert decode_request(data[LENGTH_BYTES:]) == message


@pytest.mark.parametrize("message", REPLIES, ids=lambda m: type(m).__name__)
def test_every_reply_comes_back_equal(message):
    assert decode_reply(encode(message)[LENGTH_BYTES:]) == message


def test_literal_bytes_of_a_request_and_of_an_error():
    assert encode(Ping(id=1)).hex() == "0000000d82a26f70a470696e67a2696401"
    expected = {"op": "error", "id": 8, "kind": "not_loaded", "message": "no"}
    assert msgpack.unpackb(encode(REPLIES[8])[LENGTH_BYTES:]) == expected


def test_unknown_fields_are_ignored_and_missing_optional_ones_take_their_defaults():
    newer = msgpack.packb({"op": "ping", "id": 7, "colour": "blue"})
    assert decode_request(newer) == Ping(id=7)
    older = msgpack.packb({"op": "pong", "id": 1, "protocol": 1, "build": "b", "state": "empty"})
    assert decode_reply(older) == REPLIES[0]


def test_an_unknown_op_and_a_wrong_field_can_be_answered():
    assert decode_request(msgpack.packb({"op": "dance", "id": 5})) == Unknown(5, "dance")
    assert decode_request(msgpack.packb({"id": 5})) == Unknown(5, "")
    wrong = decode_request(msgpack.packb({"op": "connect", "id": 5, "side": 9}))
    assert isinstance(wrong, Unknown)
    assert wrong.malformed


def test_a_reply_is_no_request():
    assert decode_request(encode(Bye(id=1))[LENGTH_BYTES:]) == Unknown(1, "bye")


def test_a_message_beyond_the_limit_is_refused_by_its_length():
    with pytest.raises(PeerError):
        body_length((MESSAGE_BYTES + 1).to_bytes(4))


def test_ten_thousand_mutated_messages_are_messages_or_peer_errors():
    generator = random.Random(3)
    corpus = [encode(message)[LENGTH_BYTES:] for message in REQUESTS + REPLIES]
    outcomes = {"read": 0, "unknown": 0, "refused": 0}
    for _ in range(10_000):
        data = bytearray(generator.choice(corpus))
        for _ in range(generator.randint(1, 3)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        for decode in (decode_request, decode_reply):
            try:
                outcomes["unknown" if isinstance(decode(bytes(data)), Unknown) else "read"] += 1
            except PeerError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 100
