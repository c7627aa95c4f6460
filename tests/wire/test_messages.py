from __future__ import annotations

import msgpack
import msgspec
import pytest

from meshnode.errors import PeerError
from meshnode.identity.ids import NodeId
from meshnode.wire import limits
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.messages import (
    OP_CHARACTERS,
    Abort,
    Announce,
    AnyMessage,
    Buckets,
    Claim,
    ClaimedStage,
    Commit,
    Committed,
    Connect,
    Connected,
    DemandRecord,
    Drain,
    Failed,
    FenceOff,
    Fetched,
    Grant,
    Have,
    Holding,
    Hop,
    Introduce,
    Leave,
    Ping,
    Pong,
    Prepare,
    Probe,
    Probed,
    Progress,
    Ready,
    Refuse,
    Renew,
    Renewed,
    Revoke,
    RunOptions,
    Summary,
    Suspect,
    Unknown,
    Unrecognised,
    Want,
    WhoIs,
    decode,
    encode,
)
from tests.identity.mutate import mutations

A, B = NodeId("a" * 52), NodeId("b" * 51 + "a")
FENCE = Fence(Term(3), RunId("0123456789abcdef"))
OPTIONS = RunOptions(context=4096, lanes=4, chunk=128, kv_type="q8_0", flash_attention=True)
CLAIM = Claim(
    fence=FENCE,
    deployment="d1",
    model="org/model",
    manifest_digest="ab" * 32,
    plan_digest="cd" * 32,
    coordinator=A,
    layers=9,
    options=OPTIONS,
    stages=(ClaimedStage(0, A, 0, 4, 100, 10, 260), ClaimedStage(1, B, 4, 9, 120, 12, 282)),
)
PREPARE = Prepare(
    fence=FENCE,
    deployment="d1",
    manifest_digest="ab" * 32,
    source=A,
    stage=1,
    stages=2,
    first=4,
    last=9,
    layers=9,
    options=OPTIONS,
    upstream=Hop(bytes(range(16)), "s0.0123456789abcdef.mesh", A),
    downstream=Hop(bytes(16), "head.0123456789abcdef.mesh", A),
)
ALL: list[AnyMessage] = [
    Introduce((b"leaf", b"issuer")),
    Announce(A, b"body", b"signature", 1500),
    Leave(),
    Ping(1),
    Pong(2**63),
    CLAIM,
    Grant(FENCE, "d1"),
    Refuse(FENCE, "d1", "no_room", "10 bytes are free", 7, 10),
    PREPARE,
    Progress(FENCE, 1, "fetching", 5, 10),
    Ready(FENCE, 1),
    Failed(FENCE, 1, "model", "corrupt"),
    Connect(FENCE),
    Connected(FENCE, 1),
    Commit(FENCE),
    Abort(FENCE, "withdrawn"),
    Unknown("later"),
    WhoIs((A, B)),
    Have((bytes(16),)),
    Want((bytes(16), b"x" * 16)),
    Summary(b"root"),
    Buckets((b"hash",) * limits.GOSSIP_BUCKETS),
    Holding((0, 15), (bytes(16),)),
    Suspect(A, b"body", b"signature"),
    Revoke((b"issuer",), b"body", b"signature"),
    DemandRecord(A, (b"leaf", b"issuer"), b"body", b"signature"),
    Probe(A, 7),
    Probed(7, True),
    Drain(True),
    Fetched(FENCE, 1),
    Committed(FENCE),
    FenceOff(FENCE, "d1"),
    Renew(FENCE, 7),
    Renewed(FENCE, 7, held=False),
]

FENCE_GOLDEN = "a566656e6365 82 a47465726d 03 a372756e b0 30313233343536373839616263646566"
GOLDEN: dict[str, AnyMessage] = {
    "81 a26f70 a56c65617665": Leave(),
    "82 a26f70 a470696e67 a56e6f6e6365 01": Ping(1),
    "82 a26f70 a9696e74726f64756365 a5636861696e 92 c4046c656166 c406697373756572": Introduce((b"leaf", b"issuer")),
    f"83 a26f70 a56772616e74 {FENCE_GOLDEN} aa6465706c6f796d656e74 a26431": Grant(FENCE, "d1"),
    f"83 a26f70 a561626f7274 {FENCE_GOLDEN} a6726561736f6e a977697468647261776e": Abort(FENCE, "withdrawn"),
    f"83 a26f70 a57265616479 {FENCE_GOLDEN} a57374616765 01": Ready(FENCE, 1),
    f"82 a26f70 a6636f6d6d6974 {FENCE_GOLDEN}": Commit(FENCE),
}
"""What version 1 of the protocol puts on the wire, typed in by hand and never generated."""


def fields(message: AnyMessage) -> dict[str, object]:
    """As the independent reader sees it."""
    read = msgpack.unpackb(encode(message))
    assert isinstance(read, dict)
    return read


def test_there_is_an_example_of_every_message() -> None:
    assert {type(message) for message in ALL} == set(AnyMessage.__args__)


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_every_message_survives_the_way_there_and_an_independent_encoder(message: AnyMessage) -> None:
    assert decode(encode(message)) == message
    assert fields(message)["op"] == type(message).__name__.lower()
    assert decode(msgpack.packb(fields(message))) == message


@pytest.mark.parametrize(("golden", "message"), GOLDEN.items(), ids=lambda each: type(each).__name__)
def test_the_bytes_of_version_1_stay_what_they_are(golden: str, message: AnyMessage) -> None:
    assert encode(message) == bytes.fromhex(golden)
    assert decode(bytes.fromhex(golden)) == message


def test_the_order_of_fields_does_not_matter() -> None:
    for message in ALL:
        backwards = dict(reversed(list(fields(message).items())))
        assert decode(msgpack.packb(backwards)) == message


def test_fields_of_later_versions_are_ignored() -> None:
    for message in ALL:
        assert decode(msgpack.packb({**fields(message), "colour": {"deep": [1, None, b"x"]}})) == message


def test_absent_fields_have_defaults_where_an_older_node_may_leave_them_out() -> None:
    refusal = fields(ALL[7])
    del refusal["promised"], refusal["free_bytes"]
    assert decode(msgpack.packb(refusal)) == Refuse(FENCE, "d1", "no_room", "10 bytes are free", 0, 0)
    claim = fields(CLAIM)
    options = claim["options"]
    assert isinstance(options, dict)
    del options["wire_dtype"], options["kv_unified"]
    assert decode(msgpack.packb(claim)) == CLAIM


def test_an_absent_field_without_a_default_is_the_peers_error() -> None:
    for name in fields(CLAIM).keys() - {"releases", "demand"}:
        damaged = {key: value for key, value in fields(CLAIM).items() if key != name}
        with pytest.raises(PeerError, match="malformed"):
            decode(msgpack.packb(damaged))


def test_an_op_that_this_node_does_not_know_is_told_back_and_only_once() -> None:
    told = decode(msgpack.packb({"op": "gossip", "ids": [b"x" * 16]}))
    assert told == Unrecognised("gossip")
    assert isinstance(told, Unrecognised)
    answer = decode(encode(told.reply))
    assert answer == Unknown("gossip")
    assert not isinstance(answer, Unrecognised), "an Unknown is never answered"


def test_a_long_unknown_op_is_cut() -> None:
    assert decode(msgpack.packb({"op": "x" * 5000})) == Unrecognised("x" * OP_CHARACTERS)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        msgpack.packb([]),
        msgpack.packb("ping"),
        msgpack.packb({"nonce": 1}),
        msgpack.packb({"op": 7}),
        msgpack.packb({"op": "ping", "nonce": "1"}),
        msgpack.packb({"op": "ping", "nonce": 1.5}),
        msgpack.packb({"op": "ping", "nonce": 1}) + b"\0",
        b"\x91" * 60_000,
        b"\x81\xa2op\xa1\xff",
    ],
)
def test_what_is_no_message_is_the_peers_error(frame: bytes) -> None:
    with pytest.raises(PeerError, match="malformed"):
        decode(frame)


@pytest.mark.parametrize(
    "message",
    [
        Have((bytes(15),)),
        Want((bytes(16),) * (limits.GOSSIP_IDS + 1)),
        WhoIs((A,) * (limits.GOSSIP_IDS + 1)),
        Buckets((b"",) * (limits.GOSSIP_BUCKETS + 1)),
        Holding((limits.GOSSIP_BUCKETS,), ()),
        Holding((-1,), ()),
        Holding((0,) * (limits.GOSSIP_BUCKETS + 1), ()),
        WhoIs((NodeId("a" * 53),)),
        Announce(NodeId("a" * 53), b"body", b"signature"),
        Suspect(NodeId("a" * 53), b"body", b"signature"),
        Probe(NodeId("a" * 53), 1),
    ],
)
def test_lists_of_gossip_are_bounded(message: AnyMessage) -> None:
    with pytest.raises(PeerError):
        decode(encode(message))


def test_an_announcement_of_an_older_node_counts_for_its_whole_time() -> None:
    told = fields(ALL[1])
    del told["remaining_ms"]
    assert decode(msgpack.packb(told)) == Announce(A, b"body", b"signature", limits.ANNOUNCEMENT_TTL_MS)


@pytest.mark.parametrize("fence", [Fence(Term(0), FENCE.run), Fence(FENCE.term, RunId("f" * 60_000))])
def test_no_message_carries_a_malformed_fence(fence: Fence) -> None:
    """Answers repeat it: what is longer than a fence would not fit the frame of the answer."""
    for message in ALL:
        if hasattr(message, "fence"):
            with pytest.raises(PeerError, match="malformed fence"):
                decode(encode(msgspec.structs.replace(message, fence=fence)))


@pytest.mark.parametrize("count", [0, limits.STAGES + 1])
def test_a_claim_names_some_stages_and_not_too_many(count: int) -> None:
    with pytest.raises(PeerError, match=f"names {count} stages"):
        decode(encode(msgspec.structs.replace(CLAIM, stages=CLAIM.stages[:1] * count)))


@pytest.mark.parametrize(
    "message",
    [
        msgspec.structs.replace(CLAIM, model="\x1b[2J"),
        msgspec.structs.replace(CLAIM, deployment="line\nline"),
        Progress(FENCE, 1, "\x1b[2J", 5, 10),
        Progress(FENCE, 1, "f" * 17, 5, 10),
    ],
)
def test_what_comes_to_a_terminal_is_printable(message: AnyMessage) -> None:
    with pytest.raises(PeerError, match="cannot be shown"):
        decode(encode(message))


def test_a_deployment_takes_as_many_bytes_as_characters() -> None:
    """1024 of them are kept in a file of 64 KiB: 96 KB of others would end the node that writes it."""
    with pytest.raises(PeerError, match="cannot be shown"):
        decode(encode(msgspec.structs.replace(CLAIM, deployment="\N{GRINNING FACE}" * 16)))


def test_the_largest_claim_fits_its_frame() -> None:
    size = 10**15
    stage = ClaimedStage(255, A, 99_999, 99_999, size, size, size)
    largest = msgspec.structs.replace(CLAIM, model="m" * 512, stages=(stage,) * limits.STAGES)
    assert len(encode(largest)) <= limits.CONTROL_FRAME


def test_damaged_frames_end_in_messages_or_peer_errors() -> None:
    outcomes = {"message": 0, "error": 0}
    for frame in mutations([encode(message) for message in ALL]):
        try:
            assert isinstance(decode(frame), AnyMessage | Unrecognised)
            outcomes["message"] += 1
        except PeerError:
            outcomes["error"] += 1
    assert min(outcomes.values()) > 100, "damage of both kinds was tried"
