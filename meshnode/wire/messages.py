"""Messages of a CONTROL link, between members. One MessagePack map each, told apart by its `op`.

Growth is additive: unknown fields are ignored, missing ones take their defaults, an unknown `op` is answered with
`Unknown` and the link stays; an `Unknown` is never answered. Sizes are bounded by the frame limit
(`limits.CONTROL_FRAME`) and by `decode`.

    Introduce, Announce, Leave            who is there            core/membership
    Ping, Pong                            is the link alive       core/membership
    Claim -> Grant | Refuse               may I use your memory   core/coordination
    Prepare -> Progress*, Ready | Failed  fetch, start, load      core/coordination
    Connect -> Connected | Failed         dial the next stage     core/coordination
    Commit, Abort -> (nothing)            it serves, or it ends   core/coordination
"""

from __future__ import annotations

import msgspec

from meshnode.errors import PeerError
from meshnode.identity.ids import NodeId
from meshnode.wire.fence import Fence, is_fence
from meshnode.wire.limits import STAGES

OP_CHARACTERS = 64
"""Of an unknown op that are told back: the longest of ours has 9."""


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


class Leave(Message, frozen=True):
    """The sender goes away on purpose; what it did for others ends now."""


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


class Grant(Message, frozen=True):
    """Yes: reserved, and the term is promised on disk."""

    fence: Fence
    deployment: str


class Refuse(Message, frozen=True):
    """No: `reason` is machine-readable, `promised` the highest term granted here, `free_bytes` what is left."""

    fence: Fence
    deployment: str
    reason: str
    message: str
    promised: int = 0
    free_bytes: int = 0


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


class Progress(Message, frozen=True):
    """How far a stage is: phase "fetching" counts bytes, "loading" parts per thousand."""

    fence: Fence
    stage: int
    phase: str
    done: int
    total: int


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
    | Ping
    | Pong
    | Claim
    | Grant
    | Refuse
    | Prepare
    | Progress
    | Ready
    | Failed
    | Connect
    | Connected
    | Commit
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
    fence: Fence | None = getattr(message, "fence", None)
    if fence is not None and not is_fence(fence):
        raise PeerError("a malformed fence")
    if isinstance(message, Claim) and not 0 < len(message.stages) <= STAGES:
        raise PeerError(f"a claim names {len(message.stages)} stages, at most {STAGES} are allowed")
    return message
