"""Messages of a CONTROL link, between members. One MessagePack map each, told apart by its `op`.

Growth is additive: unknown fields are ignored, missing ones take their defaults, an unknown `op` is answered with
`Unknown` and the link stays; an `Unknown` is never answered. Sizes are bounded by the frame limit
(`limits.CONTROL_FRAME`) and by `decode`.

    Introduce, Announce, Leave            who is there            core/membership
    WhoIs -> Introduce, Announce          whose certificate       core/membership
    Have -> Want -> (what was wanted)     what is new             core/membership
    Summary -> Buckets -> Holding         what differs            core/membership
    Suspect, Revoke                       who is to be left out   core/membership
    DemandRecord                          what shall be served    core/coordination
    Ping -> Pong, Probe -> Probed         is the peer alive       core/membership
    Claim -> Grant | Refuse               may I use your memory   core/coordination
    Prepare -> Progress*, Ready | Failed  fetch, start, load      core/coordination
    Connect -> Connected | Failed         dial the next stage     core/coordination
    Commit -> Committed                   it serves               core/coordination
    FenceOff, Abort -> (nothing)          an older run, it ends   core/coordination
    Renew -> Renewed                      the lease goes on       core/coordination
"""

from __future__ import annotations

import msgspec

from meshnode.errors import PeerError
from meshnode.identity.ids import ID_CHARACTERS, NodeId
from meshnode.wire.fence import Fence, is_fence
from meshnode.wire.limits import ANNOUNCEMENT_TTL_MS, GOSSIP_BUCKETS, GOSSIP_ID, GOSSIP_IDS, SOURCES, STAGES

OP_CHARACTERS = 64
"""Of an unknown op that are told back: the longest of ours has 9."""
PHASE_CHARACTERS = 16
"""Of what a stage does: the longest of ours has 9."""


class Message(msgspec.Struct, frozen=True, tag_field="op", tag=str.lower):
    """Base of everything that a CONTROL link carries."""


class Introduce(Message, frozen=True):
    """The certificate chain of an author, DER, leaf first, root left out. Once per link and author."""

    chain: tuple[bytes, ...]


class Announce(Message, frozen=True):
    """An announcement exactly as its author signed it (core/membership/announcement)."""

    author: NodeId
    body: bytes
    signature: bytes
    remaining_ms: int = ANNOUNCEMENT_TTL_MS
    """How long it still counts, from receipt. Not signed: a receiver only ever shortens what is left."""


class Suspect(Message, frozen=True):
    """A suspicion exactly as its author signed it (core/membership/suspicion)."""

    author: NodeId
    body: bytes
    signature: bytes


class Revoke(Message, frozen=True):
    """A revocation list exactly as its issuer signed it (identity/revocation)."""

    chain: tuple[bytes, ...]
    """Certificate of the issuer, DER, root left out; empty for a list of the root itself."""
    body: bytes
    signature: bytes


class DemandRecord(Message, frozen=True):
    """A demand (wire/demand) exactly as its author signed it. With the author's certificates: it is to be judged where
    the author was never met, and long after it is gone."""

    author: NodeId
    chain: tuple[bytes, ...]
    """DER, leaf first, root left out."""
    body: bytes
    signature: bytes


class WhoIs(Message, frozen=True):
    """Answered by an Introduce of each author that is known, and its announcement."""

    authors: tuple[NodeId, ...]


class Have(Message, frozen=True):
    """Ids of announcements, suspicions, lists and demands that the sender has: 16 bytes of each one's SHA-256."""

    ids: tuple[bytes, ...]


class Want(Message, frozen=True):
    """Ids whose content the sender lacks; answered by what the receiver still has of them."""

    ids: tuple[bytes, ...]


class Summary(Message, frozen=True):
    """A hash over all ids the sender has; answered by Buckets or Holding when the receiver's differs."""

    root: bytes


class Buckets(Message, frozen=True):
    """A hash for each of the 16 parts of the sender's ids, by their first half byte."""

    hashes: tuple[bytes, ...]


class Holding(Message, frozen=True):
    """All ids of the sender in these buckets; answered by Have and Want of the difference."""

    buckets: tuple[int, ...]
    ids: tuple[bytes, ...]


class Probe(Message, frozen=True):
    """Can you reach `target`? Answered by Probed with the same number, or not at all."""

    target: NodeId
    nonce: int


class Probed(Message, frozen=True):
    """Answer to a Probe."""

    nonce: int
    reached: bool


class Leave(Message, frozen=True):
    """The sender goes away on purpose; what it did for others ends now."""


class Drain(Message, frozen=True):
    """Take no more work and let go of what can go elsewhere; or, with `draining` false, take work again.

    Between members: who may claim a node's memory may also ask it to keep it.
    """

    draining: bool = True


class Ping(Message, frozen=True):
    """Answered by a Pong with the same number."""

    nonce: int


class Pong(Message, frozen=True):
    """Answer to a Ping."""

    nonce: int


class ClaimedStage(msgspec.Struct, frozen=True):
    """One slice of a claim and what it takes on its node."""

    stage: int
    node: NodeId
    first: int
    last: int
    weight_bytes: int
    kv_bytes: int
    reserved_bytes: int
    """Weights + KV + compute buffers: what the node's ledger books."""


class RunOptions(msgspec.Struct, frozen=True):
    """What every stage of a run shares."""

    context: int
    """Cells of the KV cache in all."""
    lanes: int
    chunk: int
    """Rows of the largest microbatch."""
    kv_type: str
    flash_attention: bool
    wire_dtype: str = "f16"
    kv_unified: bool = True


class Claim(Message, frozen=True):
    """May this run use your memory? Comes from its coordinator itself (checked against the link's peer)."""

    fence: Fence
    deployment: str
    model: str
    manifest_digest: str
    plan_digest: str
    coordinator: NodeId
    layers: int
    options: RunOptions
    stages: tuple[ClaimedStage, ...]
    releases: Fence | None = None
    """The run of the same deployment in whose place it comes: what it holds may be booked again and taken over."""
    demand: DemandRecord | None = None
    """What it answers: who grants keeps it, and can answer it when the coordinator is gone."""


class Grant(Message, frozen=True):
    """Yes: reserved, and the term is promised on disk."""

    fence: Fence
    deployment: str


class Refuse(Message, frozen=True):
    """No: `reason` is machine-readable, `promised` the highest term granted here, `free_bytes` what it may have."""

    fence: Fence
    deployment: str
    reason: str
    message: str
    promised: int = 0
    free_bytes: int = 0
    holder_fence: Fence | None = None
    """The run that is in the way, where one is."""
    holder: NodeId = NodeId("")
    """Its coordinator."""


class Hop(msgspec.Struct, frozen=True):
    """One end of an activation stream: the token of the preface and the certificate name of the other end."""

    token: bytes
    peer_name: str
    node: NodeId
    """The node of the other end."""


class Prepare(Message, frozen=True):
    """Fetch, start and load one stage of a granted run."""

    fence: Fence
    deployment: str
    manifest_digest: str
    source: NodeId
    """A node that has the bytes of the model."""
    stage: int
    stages: int
    first: int
    last: int
    layers: int
    options: RunOptions
    upstream: Hop
    downstream: Hop
    sources: tuple[NodeId, ...] = ()
    """Others that have some of the bytes, asked in this order after `source`."""
    hold: bool = False
    """Fetch and check what is missing, say Fetched, and touch nothing else: the run in whose place it comes still
    serves. The same order without `hold` follows."""


class Progress(Message, frozen=True):
    """How far a stage is: phase "fetching" counts bytes, "loading" parts per thousand."""

    fence: Fence
    stage: int
    phase: str
    done: int
    total: int


class Fetched(Message, frozen=True):
    """Everything that an order with `hold` needs is on this node's disk, checked."""

    fence: Fence
    stage: int


class Ready(Message, frozen=True):
    """The stage is loaded, its probe decode went through, and its hop tokens are known to its node."""

    fence: Fence
    stage: int


class Failed(Message, frozen=True):
    """A stage could not be prepared or connected, or ended. `reason` is machine-readable."""

    fence: Fence
    stage: int
    reason: str
    message: str


class Connect(Message, frozen=True):
    """Every stage is ready: dial the next one."""

    fence: Fence


class Connected(Message, frozen=True):
    """The stage's downstream connection was dialed and handed to it."""

    fence: Fence
    stage: int


class Commit(Message, frozen=True):
    """The probe went through: the run serves."""

    fence: Fence


class Committed(Message, frozen=True):
    """The commit is on disk."""

    fence: Fence


class FenceOff(Message, frozen=True):
    """The run `fence` serves: every run of the deployment with a lower term ends, and none of them comes back."""

    fence: Fence
    deployment: str


class Renew(Message, frozen=True):
    """The coordinator still wants the run: its lease begins anew at receipt."""

    fence: Fence
    number: int


class Renewed(Message, frozen=True):
    """Answer to a Renew. `held` is False where the run is not: the node was restarted, or the lease had ended."""

    fence: Fence
    number: int
    held: bool = True


class Abort(Message, frozen=True):
    """The run ends, in whatever state it is. Idempotent."""

    fence: Fence
    reason: str


class Unknown(Message, frozen=True):
    """Answer to a message whose `op` this node does not know."""

    unknown_op: str


AnyMessage = (
    Introduce
    | Announce
    | Leave
    | Drain
    | Ping
    | Pong
    | WhoIs
    | Have
    | Want
    | Summary
    | Buckets
    | Holding
    | Suspect
    | Revoke
    | DemandRecord
    | Probe
    | Probed
    | Claim
    | Grant
    | Refuse
    | Prepare
    | Progress
    | Fetched
    | Ready
    | Failed
    | Connect
    | Connected
    | Commit
    | Committed
    | FenceOff
    | Renew
    | Renewed
    | Abort
    | Unknown
)


class Unrecognised(msgspec.Struct, frozen=True):
    """What `decode` makes of an op that this node does not know. Not a message itself: to be answered by `reply`."""

    op: str

    @property
    def reply(self) -> Unknown:
        """Tells the sender."""
        return Unknown(self.op)


class _Envelope(msgspec.Struct):
    op: str


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)
_envelope = msgspec.msgpack.Decoder(_Envelope)
_number_only = frozenset({Ping, Pong})
"""Most of what comes, with nothing in it to check beyond its type."""
_known = {kind.__struct_config__.tag for kind in AnyMessage.__args__}


def encode(message: AnyMessage) -> bytes:
    """One message as the body of one frame."""
    return _encoder.encode(message)


def decode(frame: bytes) -> AnyMessage | Unrecognised:
    """The message in `frame`, or the op that this node does not know.

    Raises PeerError when the bytes are no message.
    """
    try:
        op = _envelope.decode(frame).op
        if op not in _known:
            return Unrecognised(op[:OP_CHARACTERS])
        message: AnyMessage = _decoder.decode(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PeerError(f"malformed control message: {error}") from None
    if type(message) in _number_only:
        return message
    fence: Fence | None = getattr(message, "fence", None)
    if fence is not None and not is_fence(fence):
        raise PeerError("a malformed fence")
    _check_gossip(message)
    _check_coordination(message)
    return message


def _check_gossip(message: AnyMessage) -> None:
    match message:
        case Have(ids=ids) | Want(ids=ids) | Holding(ids=ids):
            if len(ids) > GOSSIP_IDS or any(len(each) != GOSSIP_ID for each in ids):
                raise PeerError("a malformed list of ids")
        case WhoIs(authors=authors):
            if len(authors) > GOSSIP_IDS or any(len(author) > ID_CHARACTERS for author in authors):
                raise PeerError("too many authors are asked for, or by too long ids")
        case Announce(author=node) | Suspect(author=node) | Probe(target=node):
            if len(node) > ID_CHARACTERS:  # it is remembered before anything proves it
                raise PeerError("an id that is too long to be one")
        case Buckets(hashes=hashes):
            if len(hashes) != GOSSIP_BUCKETS:
                raise PeerError("a malformed list of buckets")
        case _:
            pass
    if isinstance(message, Holding):
        buckets = message.buckets
        # Each of the ids is looked for among them: 25,000 repetitions would cost half a second.
        if len(buckets) > GOSSIP_BUCKETS or not set(buckets) <= set(range(GOSSIP_BUCKETS)):
            raise PeerError("a bucket that does not exist, or one more than once")


def _check_coordination(message: AnyMessage) -> None:
    match message:
        case Claim(stages=stages, deployment=deployment, model=model):
            if not 0 < len(stages) <= STAGES:
                raise PeerError(f"a claim names {len(stages)} stages, at most {STAGES} are allowed")
            # A deployment is counted in characters where it is kept (core/coordination/ledger), in a file of bytes; a
            # model's name comes to other people's terminals.
            if not (deployment.isascii() and deployment.isprintable() and model.isprintable()):
                raise PeerError("a claim for a deployment or model that cannot be shown")
        case Prepare(sources=sources):
            if len(sources) > SOURCES:
                raise PeerError(f"an order names {len(sources)} sources, at most {SOURCES} are allowed")
        case Progress(phase=phase):
            if len(phase) > PHASE_CHARACTERS or not phase.isprintable():
                raise PeerError("a stage does what cannot be shown")
        case _:
            pass
