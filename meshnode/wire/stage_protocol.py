"""What a node and its stage process say to each other over their inherited socket pair.

A message is a 4-byte big-endian length and one MessagePack map with `op` (which message) and `id` (which request).
The node numbers its requests 1, 2, 3, ...; the stage answers each with exactly one final reply of that id, in whatever
order they are done, and may send `Accepted` and `Progress` before it. `Event` has id 0 and answers nothing.

    Ping -> Pong               works before a load and during one
    Prepare -> Prepared        the stage makes its own key; it never leaves the process
    Credentials -> Done        the certificate for that key, who its neighbours must be, the fence
    Load -> Accepted, Progress*, Loaded
    Cancel -> Done             the load that runs then ends with Error("cancelled")
    Connect (+ descriptor) -> Connected      when the other end has proved its name and the fence
    Adopt -> Done              new fence, certificate and neighbours; the model and its KV cache stay
    Lease -> Done              frames are answered until then; without one, for ever (bench, verify)
    Bar -> Done                streams with stages of these nodes end, and none is let in again
    Stats -> Statistics
    Unload -> Done             Connect and frames are refused until the next Load
    Shutdown -> Bye            then exit code 0

Every request can be answered by Error; its kinds are listed in docs/protocols/stage.md. Unknown fields are ignored and
missing ones have defaults, so either end may be one version older.
"""

from __future__ import annotations

from typing import Final, TypeVar, get_args

import msgspec

from meshnode.errors import PeerError
from meshnode.identity.ids import NodeId
from meshnode.wire.fence import Fence
from meshnode.wire.messages import RunOptions

PROTOCOL: Final = 1
MESSAGE_BYTES: Final = 64 * 1024
"""The largest are Credentials: a chain of three certificates in PEM, 4 KiB."""
LENGTH_BYTES: Final = 4
UPSTREAM: Final = "upstream"
DOWNSTREAM: Final = "downstream"


class StageMessage(msgspec.Struct, frozen=True, tag_field="op", tag=str.lower, kw_only=True):
    """Base of all messages."""

    id: int = 0
    """The request this is or answers; 0 for events."""


class Ping(StageMessage, frozen=True):
    """Who are you? Answered at any time."""


class Pong(StageMessage, frozen=True):
    """Identity. `state`: empty, loading, loaded. `layers` = [first, last) of `layer_count`, zeros before Load."""

    protocol: int
    build: str
    state: str
    stage: int = 0
    stages: int = 0
    first: int = 0
    last: int = 0
    layer_count: int = 0
    fingerprint: str = ""
    """What bits depend on (SERVING, deterministic mode); empty before Loaded."""
    manifest_digest: str = ""


class Prepare(StageMessage, frozen=True):
    """Make a key for this stage's certificate (a second Prepare answers with the same key)."""


class Prepared(StageMessage, frozen=True):
    """DER SubjectPublicKeyInfo of the stage's Ed25519 key."""

    public_key: bytes


class Credentials(StageMessage, frozen=True):
    """PEM chain (leaf first, root left out) for the prepared key, PEM root, exact SAN names of both neighbours."""

    chain: bytes
    root: bytes
    upstream_name: str
    downstream_name: str
    fence: Fence


class Adopt(StageMessage, frozen=True):
    """As Credentials, for a stage that keeps its model and cache; open streams are closed first."""

    chain: bytes
    root: bytes
    upstream_name: str
    downstream_name: str
    fence: Fence
    stage: int
    stages: int
    clear: bool = False
    """Empty every lane: the head is another one and knows of none."""


class LoadStage(msgspec.Struct, frozen=True, kw_only=True):
    """Which slice, and how to run it."""

    slice_path: str
    """A GGUF of layers [first, last), or the original file where one stage runs the whole model."""
    embedding_path: str = ""
    """A GGUF with `token_embd`; stage 0 of several only."""
    stage: int
    stages: int
    first: int
    last: int
    layer_count: int
    """Of the whole model."""
    manifest_digest: str = ""
    options: RunOptions
    threads: int = 1
    step_deadline_ms: int = 60_000
    """One llama_decode: a 512-row chunk of a model at the edge of a slow machine takes tens of seconds."""
    silence_ms: int = 2_000
    """A neighbour that says nothing for this long is lost (NETWORK: heartbeat every 250 ms, lost at 2 s)."""


class Load(StageMessage, frozen=True):
    """Load and probe."""

    what: LoadStage


class Accepted(StageMessage, frozen=True):
    """The load began."""


class Progress(StageMessage, frozen=True):
    """0.0 to 1.0 of the weights."""

    fraction: float


class Loaded(StageMessage, frozen=True):
    """The probe decode went through. Bytes by kind as the engine reports them (weights, kv, compute, ...)."""

    width: int
    vocabulary: int
    trim_any: bool
    fingerprint: str
    memory_bytes: dict[str, int] = {}
    milliseconds: int = 0


class Cancel(StageMessage, frozen=True):
    """Stop the load that runs, if any."""


class Connect(StageMessage, frozen=True):
    """`side` "upstream": an accepted descriptor (the stage is the TLS server); "downstream": a dialed one.

    The descriptor travels with this message's bytes as SCM_RIGHTS.
    """

    side: str


class Connected(StageMessage, frozen=True):
    """The other end proved the expected name and greeted with the same fence."""

    side: str


class Lease(StageMessage, frozen=True):
    """The run may be served for so long from now, by the clock of this machine; a later Lease replaces it."""

    remaining_ms: int


class Bar(StageMessage, frozen=True):
    """Nodes that were revoked, of the two neighbours': a stage has no other. Never taken back."""

    nodes: tuple[NodeId, ...]


class Stats(StageMessage, frozen=True):
    """How much was done?"""


class Statistics(StageMessage, frozen=True):
    """Counters since Load; times in microseconds, summed over microbatches."""

    microbatches: int = 0
    rows: int = 0
    failures: int = 0
    samples: int = 0
    compute_us: int = 0
    """Inside the engine."""
    overhead_us: int = 0
    """From a frame read to its answer sent, without the engine."""
    bytes_in: int = 0
    bytes_out: int = 0
    cells_used: int = 0
    cost_us: dict[int, int] = {}
    """Rows of a microbatch -> exponentially weighted mean of its compute time."""


class Unload(StageMessage, frozen=True):
    """Free the model."""


class Shutdown(StageMessage, frozen=True):
    """End the process."""


class Bye(StageMessage, frozen=True):
    """The last message of a stage."""


class Done(StageMessage, frozen=True):
    """The request was carried out."""


class Error(StageMessage, frozen=True):
    """The request was not carried out."""

    kind: str
    """Machine-readable; a kind that the reader does not know is treated like any other."""
    message: str


class Event(StageMessage, frozen=True):
    """Something happened that nobody asked for: kinds in docs/protocols/stage.md."""

    kind: str
    message: str
    side: str = ""


Request = Ping | Prepare | Credentials | Adopt | Load | Cancel | Connect | Lease | Bar | Stats | Unload | Shutdown
Reply = Pong | Prepared | Accepted | Progress | Loaded | Connected | Statistics | Done | Bye | Error | Event


class _Envelope(msgspec.Struct):
    op: str = ""
    id: int = 0


class Unknown(msgspec.Struct, frozen=True):
    """A message whose `op` this end does not know, or whose fields it cannot read (`malformed`)."""

    id: int
    op: str
    malformed: str = ""


_encoder = msgspec.msgpack.Encoder()
_envelope = msgspec.msgpack.Decoder(_Envelope)
_request: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_request_ops = frozenset(kind.__struct_config__.tag for kind in get_args(Request))
_reply_ops = frozenset(kind.__struct_config__.tag for kind in get_args(Reply))
_Message = TypeVar("_Message")


def encode(message: Request | Reply) -> bytes:
    """Length and body."""
    body = _encoder.encode(message)
    assert len(body) <= MESSAGE_BYTES, "a stage message larger than its limit"
    return len(body).to_bytes(LENGTH_BYTES) + body


def body_length(prefix: bytes) -> int:
    """The length in the first LENGTH_BYTES of a message. Raises PeerError when it passes the limit."""
    length = int.from_bytes(prefix)
    if length > MESSAGE_BYTES:
        raise PeerError(f"a stage message of {length} bytes, at most {MESSAGE_BYTES} are allowed")
    return length


def decode_request(body: bytes) -> Request | Unknown:
    """A request, or `Unknown` to be answered with Error. Raises PeerError when not even op and id can be read."""
    return _decode(body, _request, _request_ops)


def decode_reply(body: bytes) -> Reply | Unknown:
    """A reply; see decode_request."""
    return _decode(body, _reply, _reply_ops)


def _decode(body: bytes, decoder: msgspec.msgpack.Decoder[_Message], known: frozenset[object]) -> _Message | Unknown:
    try:
        envelope = _envelope.decode(body)
        if envelope.op not in known:
            return Unknown(envelope.id, envelope.op[:64])
        try:
            return decoder.decode(body)
        except msgspec.ValidationError as error:
            return Unknown(envelope.id, envelope.op, str(error)[:200])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PeerError(f"malformed stage message: {type(error).__name__}") from None
