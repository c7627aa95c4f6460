"""Making a member an issuer, on a MEMBER stream of class ISSUER; messages in wire/join.

    root's node -> Appoint
    member      -> Candidate(key, signature)    a key of its own for issuing, which signs this node's id
    root's node -> Appointed(certificate)       recorded on disk before
    member      -> Installed                    on disk and in use

Anybody who is a member may ask; only what the root signed is kept.

Invariant: the issuer's private key never leaves the node that it is made on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime

import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from meshnode.errors import LinkLost, PeerError
from meshnode.identity.certificates import Authority, make_issuer
from meshnode.identity.chains import check_issuer, key_bytes, mesh_id_of_root, parse_certificate
from meshnode.identity.credentials import Credentials
from meshnode.identity.domains import Domain, sign, verify
from meshnode.identity.ids import id_bytes
from meshnode.identity.keys import public_key_of, spki_of
from meshnode.io.transport.stream import Stream
from meshnode.wire import limits
from meshnode.wire.join import (
    Appoint,
    Appointed,
    Candidate,
    Installed,
    NotAdmitted,
    decode_join,
    decode_step,
    encode_join,
)

Install = Callable[[x509.Certificate], Awaitable[None]]


async def appoint(stream: Stream, root: Authority, now: datetime, record: Install) -> x509.Certificate:
    """The certificate with which the node at the other end issues from now on; `record` keeps it before it is sent.

    `PeerError` when the node does not want it, `LinkLost` when it does not answer.
    """
    try:
        with trio.fail_after(limits.DIAL_TIMEOUT_S):
            await stream.send_frame(encode_join(Appoint()))
            candidate = decode_join(await stream.receive_frame(), Candidate)
            if isinstance(candidate, NotAdmitted):
                raise PeerError("that node does not want to be an issuer")
            key = public_key_of(candidate.public_key)
            mesh = mesh_id_of_root(root.certificate)
            verify(key, Domain.ISSUER, mesh, id_bytes(stream.peer.node_id), candidate.signature)
            certificate = make_issuer(root, key, now, stream.peer.node_id)
            await record(certificate)
            await stream.send_frame(encode_join(Appointed(certificate.public_bytes(Encoding.DER))))
            decode_step(await stream.receive_frame(), Installed)
    except trio.TooSlowError:
        raise LinkLost(f"the node did not answer within {limits.DIAL_TIMEOUT_S:g} s") from None
    return certificate


async def be_appointed(stream: Stream, own: Credentials, key: Ed25519PrivateKey, install: Install) -> None:
    """The member's part: `key` is for issuing, `install` makes the certificate durable. `PeerError`, `LinkLost`."""
    try:
        with trio.fail_after(limits.JOIN_TIMEOUT_S):
            decode_step(await stream.receive_frame(), Appoint)
            signature = sign(key, Domain.ISSUER, own.mesh_id, id_bytes(own.node_id))
            await stream.send_frame(encode_join(Candidate(spki_of(key.public_key()), signature)))
            appointed = decode_step(await stream.receive_frame(), Appointed)
            certificate = parse_certificate(appointed.certificate)
            check_issuer(certificate, own.root)
            if key_bytes(certificate) != spki_of(key.public_key()):
                raise PeerError("an appointment of another key")
            await install(certificate)
            await stream.send_frame(encode_join(Installed()))
    except trio.TooSlowError:
        raise LinkLost("the root's node said nothing more") from None
