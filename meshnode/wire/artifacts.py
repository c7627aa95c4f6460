"""What is said on a BULK stream: give me the manifest, give me these bytes of that artifact.

    GetManifest  -> Sending{size}, (Chunk{length}, <length raw bytes>)*     until size bytes were sent
    GetArtifact  -> the same; size is the length that was asked for
    Sample       -> the same, of zeros: how fast is the way between us
    anything     -> Refused{reason}   in place of any of these frames; the stream stays usable

One request at a time. Names and digests are keys, never paths. Growth is additive: unknown fields are ignored, an
unknown op is refused with reason `unknown_op`.

Invariant: decoding any bytes ends in a message or `PeerError`.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from meshnode.errors import PeerError
from meshnode.wire.limits import MIB
from meshnode.wire.manifest import ARTIFACT_BYTES_MAX, MANIFEST_BYTES_MAX

CHUNK_BYTES: Final = 1 * MIB
"""Raw bytes behind one Chunk: 64 TLS records; a refusal or a cancelled transfer waits no longer than this takes."""

SAMPLE_BYTES_MAX: Final = 32 * MIB
"""Of one measurement: a quarter of a second at 1 Gbit/s, and no member makes another send more at one request."""

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z]{1,16}(\.[0-9]{1,4})?\Z")]
Reason = Annotated[str, msgspec.Meta(pattern=r"^[a-z_]{1,32}\Z")]

REASONS: Final = ("unknown_op", "malformed", "no_manifest", "no_artifact", "bad_range", "unreadable")


class GetManifest(msgspec.Struct, frozen=True, tag_field="op", tag="get_manifest"):
    """The canonical bytes of a manifest, by digest."""

    digest: Digest


class GetArtifact(msgspec.Struct, frozen=True, tag_field="op", tag="get_artifact"):
    """`length` bytes from `offset` of one artifact of a model."""

    digest: Digest
    artifact: Name
    offset: Annotated[int, msgspec.Meta(ge=0, le=ARTIFACT_BYTES_MAX)]
    length: Annotated[int, msgspec.Meta(ge=1, le=ARTIFACT_BYTES_MAX)]


class Sample(msgspec.Struct, frozen=True, tag_field="op", tag="sample"):
    """`length` bytes of nothing, to measure the way."""

    length: Annotated[int, msgspec.Meta(ge=1, le=SAMPLE_BYTES_MAX)]


class Sending(msgspec.Struct, frozen=True, tag_field="op", tag="sending"):
    """Yes: `size` raw bytes follow, in chunks."""

    size: Annotated[int, msgspec.Meta(ge=1, le=ARTIFACT_BYTES_MAX)]


class Chunk(msgspec.Struct, frozen=True, tag_field="op", tag="chunk"):
    """`length` raw bytes follow."""

    length: Annotated[int, msgspec.Meta(ge=1, le=CHUNK_BYTES)]


class Refused(msgspec.Struct, frozen=True, tag_field="op", tag="refused"):
    """No, or no further: one of REASONS."""

    reason: Reason


Request = GetManifest | GetArtifact | Sample
Reply = Sending | Chunk | Refused

_ENCODER = msgspec.msgpack.Encoder()
_REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


class _Envelope(msgspec.Struct):
    op: str


_ENVELOPE = msgspec.msgpack.Decoder(_Envelope)
_KNOWN = frozenset({"get_manifest", "get_artifact", "sample"})


def encode(message: Request | Reply) -> bytes:
    """One message as the body of one frame."""
    return _ENCODER.encode(message)


def decode_request(frame: bytes) -> Request | Refused:
    """The request in `frame`, or what to answer to one this version does not know. Errors: PeerError."""
    try:
        if _ENVELOPE.decode(frame).op not in _KNOWN:
            return Refused("unknown_op")
        return _REQUESTS.decode(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise PeerError("a malformed request for artifacts") from None


def decode_reply(frame: bytes) -> Reply:
    """The reply in `frame`. Errors: PeerError."""
    try:
        return _REPLIES.decode(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise PeerError("a malformed answer about artifacts") from None


__all__ = [
    "CHUNK_BYTES",
    "MANIFEST_BYTES_MAX",
    "REASONS",
    "SAMPLE_BYTES_MAX",
    "Chunk",
    "GetArtifact",
    "GetManifest",
    "Refused",
    "Reply",
    "Request",
    "Sample",
    "Sending",
    "decode_reply",
    "decode_request",
    "encode",
]
