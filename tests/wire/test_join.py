from __future__ import annotations

import msgpack
import pytest

from meshnode.errors import PeerError
from meshnode.identity.chains import CERTIFICATE_BYTES
from meshnode.wire import limits
from meshnode.wire.join import (
    Admitted,
    JoinMessage,
    NotAdmitted,
    Redeem,
    Renew,
    Welcome,
    decode_join,
    decode_request,
    encode_join,
)
from tests.identity.mutate import mutations

WELCOME = Welcome(b"root", b"issuer", b"n" * 32)
REDEEM = Redeem(b"invite-8", b"n" * 32, b"k" * 44, b"s" * 64, b"m" * 32)
RENEW = Renew(b"old", b"n" * 32, b"s" * 64)
ALL: list[JoinMessage] = [WELCOME, REDEEM, RENEW, Admitted(b"certificate"), NotAdmitted("used")]


def test_the_joiner_reads_what_it_expects_or_a_refusal() -> None:
    assert decode_join(encode_join(WELCOME), Welcome) == WELCOME
    assert decode_join(encode_join(Admitted(b"x")), Admitted) == Admitted(b"x")
    assert decode_join(encode_join(NotAdmitted("used")), Admitted) == NotAdmitted("used")
    for other in (REDEEM, Admitted(b"x")):
        with pytest.raises(PeerError, match="out of order"):
            decode_join(encode_join(other), Welcome)


def test_the_issuer_reads_requests_only() -> None:
    assert decode_request(encode_join(REDEEM)) == REDEEM
    assert decode_request(encode_join(RENEW)) == RENEW
    for other in (WELCOME, Admitted(b"x"), NotAdmitted("used")):
        with pytest.raises(PeerError, match="out of order"):
            decode_request(encode_join(other))


def test_messages_are_messagepack_that_others_read() -> None:
    assert msgpack.unpackb(encode_join(NotAdmitted("used"))) == ["not_admitted", "used"]
    assert msgpack.unpackb(encode_join(RENEW)) == ["renew", b"old", b"n" * 32, b"s" * 64, b""]


def test_the_longest_message_fits_its_frame() -> None:
    longest = Welcome(bytes(CERTIFICATE_BYTES), bytes(CERTIFICATE_BYTES), bytes(32))
    assert len(encode_join(longest)) <= limits.JOIN_FRAME


@pytest.mark.parametrize(
    "message",
    [
        Welcome(bytes(CERTIFICATE_BYTES + 1), b"", bytes(32)),
        Welcome(b"", b"", bytes(31)),
        Redeem(bytes(7), bytes(32), bytes(44), bytes(64), bytes(32)),
        Redeem(bytes(8), bytes(32), bytes(45), bytes(64), bytes(32)),
        Redeem(bytes(8), bytes(32), bytes(44), bytes(64), bytes(0)),
        NotAdmitted("x" * 33),
    ],
)
def test_fields_of_other_sizes_are_refused(message: JoinMessage) -> None:
    with pytest.raises(PeerError, match="malformed"):
        decode_request(encode_join(message))


def test_damaged_messages_end_in_messages_or_peer_errors() -> None:
    for data in mutations([encode_join(message) for message in ALL]):
        for decode in (
            decode_request,
            lambda each: decode_join(each, Welcome),
            lambda each: decode_join(each, Admitted),
        ):
            try:
                assert isinstance(decode(data), JoinMessage)
            except PeerError:
                pass
