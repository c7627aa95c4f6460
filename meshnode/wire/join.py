"""The messages of a JOIN connection, in order: Welcome, Redeem or Renew, then Admitted or NotAdmitted.

Without an invite, after Welcome: Approach, Commitment, Offer, Reveal, Confirm, then Admitted or NotAdmitted.

The joiner sends nothing before Welcome's certificates matched the pins of its invite (io/transport/join).

Invariant: decoding any bytes ends in a message of the expected kind or `PeerError`.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from meshnode.errors import PeerError
from meshnode.identity.chains import CERTIFICATE_BYTES
from meshnode.identity.comparison import COMMITMENT_BYTES
from meshnode.identity.invites import INVITE_ID_BYTES
from meshnode.identity.keys import SPKI_BYTES
from meshnode.identity.transcript import MAC_BYTES, NONCE_BYTES

NAME_CHARACTERS = 63
"""Of a joiner's name; as long as a node's may be (app.config)."""

_Certificate = Annotated[bytes, msgspec.Meta(max_length=CERTIFICATE_BYTES)]
_Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]


class Welcome(msgspec.Struct, frozen=True, tag="welcome", array_like=True):
    """Issuer to joiner: the certificates that the pins are about, DER, and the issuer's nonce."""

    root: _Certificate
    issuer: _Certificate
    nonce: _Nonce


class Redeem(msgspec.Struct, frozen=True, tag="redeem", array_like=True):
    """Joiner to issuer: its key, and the proofs over the transcript."""

    invite_id: Annotated[bytes, msgspec.Meta(min_length=INVITE_ID_BYTES, max_length=INVITE_ID_BYTES)]
    nonce: _Nonce
    public_key: Annotated[bytes, msgspec.Meta(min_length=SPKI_BYTES, max_length=SPKI_BYTES)]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
    mac: Annotated[bytes, msgspec.Meta(min_length=MAC_BYTES, max_length=MAC_BYTES)]


class Renew(msgspec.Struct, frozen=True, tag="renew", array_like=True):
    """Member to issuer, instead of Redeem: a new certificate for the key of this one, which may have ended."""

    certificate: _Certificate
    nonce: _Nonce
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
    issuer: _Certificate = b""
    """Of who signed `certificate`; empty: the issuer that is asked."""


class Approach(msgspec.Struct, frozen=True, tag="approach", array_like=True):
    """Joiner to issuer, instead of Redeem: may a person there compare a number with us?"""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_CHARACTERS)]
    """What it calls itself: shown to a person, believed by nobody."""


class Commitment(msgspec.Struct, frozen=True, tag="commitment", array_like=True):
    """Issuer to joiner: `identity.comparison.commit` of its nonce."""

    digest: Annotated[bytes, msgspec.Meta(min_length=COMMITMENT_BYTES, max_length=COMMITMENT_BYTES)]


class Offer(msgspec.Struct, frozen=True, tag="offer", array_like=True):
    """Joiner to issuer: the key that asks for a certificate, and its nonce."""

    public_key: Annotated[bytes, msgspec.Meta(min_length=SPKI_BYTES, max_length=SPKI_BYTES)]
    nonce: _Nonce


class Reveal(msgspec.Struct, frozen=True, tag="reveal", array_like=True):
    """Issuer to joiner: the nonce that it committed to. Both know the number now."""

    nonce: _Nonce


class Confirm(msgspec.Struct, frozen=True, tag="confirm", array_like=True):
    """Joiner to issuer: its person said yes; the signature proves that it holds the key."""

    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class Admitted(msgspec.Struct, frozen=True, tag="admitted", array_like=True):
    """Issuer to joiner: the node certificate, DER."""

    certificate: _Certificate


class NotAdmitted(msgspec.Struct, frozen=True, tag="not_admitted", array_like=True):
    """Issuer to joiner: a `JoinRefusal`."""

    reason: Annotated[str, msgspec.Meta(max_length=32)]


class Appoint(msgspec.Struct, frozen=True, tag="appoint", array_like=True):
    """Holder of the root key to a member, on a MEMBER stream of class ISSUER: become an issuer."""


class Candidate(msgspec.Struct, frozen=True, tag="candidate", array_like=True):
    """Its answer: the key it will issue with, and that key's signature over its node id (Domain.ISSUER)."""

    public_key: Annotated[bytes, msgspec.Meta(min_length=SPKI_BYTES, max_length=SPKI_BYTES)]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class Appointed(msgspec.Struct, frozen=True, tag="appointed", array_like=True):
    """Holder of the root key to the candidate: its certificate as an issuer, DER."""

    certificate: _Certificate


class Installed(msgspec.Struct, frozen=True, tag="installed", array_like=True):
    """The new issuer: it is on disk and in use."""


JoinMessage = (
    Welcome
    | Redeem
    | Renew
    | Approach
    | Commitment
    | Offer
    | Reveal
    | Confirm
    | Admitted
    | NotAdmitted
    | Appoint
    | Candidate
    | Appointed
    | Installed
)

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[JoinMessage] = msgspec.msgpack.Decoder(JoinMessage)
_M = TypeVar("_M", bound=JoinMessage)


def encode_join(message: JoinMessage) -> bytes:
    """MessagePack, to be framed."""
    return _ENCODER.encode(message)


def decode_join(data: bytes, expected: type[_M]) -> _M | NotAdmitted:
    """One frame for the joiner; `PeerError` unless it is an `expected` or a refusal."""
    message = _decode(data)
    if not isinstance(message, (expected, NotAdmitted)):
        raise PeerError("a JOIN message out of order")
    return message


def decode_request(data: bytes) -> Redeem | Renew | Approach:
    """One frame for the issuer; `PeerError` unless it asks for something."""
    message = _decode(data)
    if not isinstance(message, (Redeem, Renew, Approach)):
        raise PeerError("a JOIN message out of order")
    return message


def decode_step(data: bytes, expected: type[_M]) -> _M:
    """One frame in the middle of an exchange; `PeerError` unless it is an `expected`."""
    message = _decode(data)
    if not isinstance(message, expected):
        raise PeerError("a JOIN message out of order")
    return message


def _decode(data: bytes) -> JoinMessage:
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise PeerError("a malformed JOIN message") from None
