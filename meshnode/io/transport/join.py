"""JOIN: an invite, or an old certificate, against a node certificate. The joiner's side.

    issuer -> Welcome(root, issuer, nonce)      joiner checks both pins, the chain, and that the TLS leaf is a
                                                node certificate of that issuer; it has sent nothing so far
    joiner -> Redeem(key, signature, mac)       issuer checks both, marks the invite used ON DISK, then signs
    issuer -> Admitted(certificate)             joiner checks that it is for its key, by that issuer

A Python client sees no peer chain before 3.13, so Welcome carries it.

Invariant: no key and no proof leaves before the other side has proven to be an issuer of the right mesh.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from meshnode.errors import InviteError, LinkLost, PeerError
from meshnode.identity.certificates import Role
from meshnode.identity.chains import key_bytes, mesh_id_of_root, parse_certificate, peer_identity, verify_chain
from meshnode.identity.credentials import Credentials
from meshnode.identity.domains import Domain
from meshnode.identity.ids import NodeId, node_id_of
from meshnode.identity.invite_book import JoinRefusal
from meshnode.identity.invites import Invite, check_not_expired, invite_key, issuer_pin, mesh_pin
from meshnode.identity.keys import spki_of
from meshnode.identity.transcript import NO_INVITE, NONCE_BYTES, Transcript, fingerprint
from meshnode.io.transport.race import first_success
from meshnode.io.transport.stream import FramedStream, MeteredStream, broken_is_lost
from meshnode.io.transport.tls import join_client_context
from meshnode.io.transport.transport import connect
from meshnode.wire import limits
from meshnode.wire.join import (
    Admitted,
    Confirm,
    JoinMessage,
    NotAdmitted,
    Redeem,
    Renew,
    Welcome,
    decode_join,
    encode_join,
)
from meshnode.wire.preface import Kind, Preface, StreamClass, encode_preface

_M = TypeVar("_M", bound=JoinMessage)
_ASK_AGAIN = "Ask for a new one: `meshnode invite`."

_REFUSALS = {
    JoinRefusal.UNKNOWN: "the issuer does not know this invite",
    JoinRefusal.USED: "this invite was already used by another machine",
    JoinRefusal.EXPIRED: "this invite has expired",
    JoinRefusal.REVOKED: "this invite was revoked",
    JoinRefusal.LOCKED: "this invite is locked after too many wrong attempts",
    JoinRefusal.WRONG_PROOF: "the issuer did not accept this invite's secret",
    JoinRefusal.CLOSED: "the issuer admits nobody without an invite from here",
    JoinRefusal.BUSY: "another machine is joining there at this moment",
    JoinRefusal.TOO_OFTEN: "the issuer saw too many machines join by number in the last hour",
    JoinRefusal.NOT_APPROVED: "nobody approved the number there in time",
    JoinRefusal.NOT_RENEWABLE: "this node's certificate is not one that the issuer renews",
    JoinRefusal.BARRED: "this machine's key was revoked from the mesh",
}


@dataclass(frozen=True)
class Joined:
    """A membership, and who gave it: the node to dial first."""

    credentials: Credentials
    issuer_node: NodeId
    """Of the TLS leaf that was checked."""
    address: str
    """The one of the invite's addresses that worked."""


async def redeem(invite: Invite, key: Ed25519PrivateKey, now: datetime) -> Joined:
    """Become a member: the first of the invite's addresses that proves to be its issuer decides.

    `InviteError` when the invite is not good any more, `PeerError` when other machines answer at its addresses,
    `LinkLost` when none does.
    """
    check_not_expired(invite, now)

    def check(root: x509.Certificate, issuer: x509.Certificate) -> None:
        right_mesh = mesh_pin(mesh_id_of_root(root)) == invite.mesh_pin
        if not right_mesh or issuer_pin(key_bytes(issuer)) != invite.issuer_pin:
            raise PeerError("another mesh or another node answers there")

    desk = await find_issuer(invite.addresses, check, now)
    spki, nonce = spki_of(key.public_key()), secrets.token_bytes(NONCE_BYTES)
    transcript = Transcript(
        mesh_id_of_root(desk.root), invite.invite_id, desk.nonce, nonce, fingerprint(desk.leaf), spki
    )
    mac = transcript.mac(invite_key(invite.secret, invite.invite_id))
    request = Redeem(invite.invite_id, nonce, spki, transcript.sign(key), mac)
    return Joined(await ask(desk, request, key, now), desk.node, desk.address)


def _trusted(issuer: NodeId) -> bool:
    return False


async def renew(
    credentials: Credentials, addresses: Sequence[str], now: datetime, revoked: Callable[[NodeId], bool] = _trusted
) -> Credentials:
    """The same membership with a certificate that starts anew; `addresses` of members: an issuer is found.

    Any issuer of the mesh will do that is not `revoked`. Works up to 180 days after the old certificate ended.
    `InviteError` when the issuer refuses, `PeerError` or `LinkLost` when there is no issuer of this mesh.
    """

    def check(root: x509.Certificate, issuer: x509.Certificate) -> None:
        if root != credentials.root:
            raise PeerError("another mesh answers there")
        if revoked(node_id_of(key_bytes(issuer))):
            raise PeerError("the issuer there was revoked")

    desk = await find_issuer(addresses, check, now)
    key, nonce = credentials.key, secrets.token_bytes(NONCE_BYTES)
    spki = spki_of(key.public_key())
    proof = Transcript(credentials.mesh_id, NO_INVITE, desk.nonce, nonce, fingerprint(desk.leaf), spki, Domain.RENEWAL)
    old, issuer = (certificate.public_bytes(Encoding.DER) for certificate in credentials.chain)
    return await ask(desk, Renew(old, nonce, proof.sign(key), issuer), key, now)


@dataclass(frozen=True)
class Desk:
    """A connection whose other end has proven to be an issuer of the right mesh."""

    stream: FramedStream
    root: x509.Certificate
    issuer: x509.Certificate
    leaf: bytes
    """The TLS leaf, DER."""
    nonce: bytes
    node: NodeId
    address: str

    async def aclose(self) -> None:
        """Close the connection."""
        await self.stream.aclose()


_Check = Callable[[x509.Certificate, x509.Certificate], None]


async def find_issuer(addresses: Sequence[str], check: _Check, now: datetime) -> Desk:
    """The first that `check` (root, issuer) accepts; `PeerError` or `LinkLost` when there is none."""

    async def attempt(address: str) -> Desk:
        return await _approach(address, check, now)

    try:
        return await first_success(addresses, attempt, Desk.aclose, limits.DIAL_TIMEOUT_S, limits.ISSUER_CANDIDATES)
    except (LinkLost, PeerError) as problem:
        raise type(problem)(f"the machine that admits cannot be reached ({problem})") from None


async def _approach(address: str, check: _Check, now: datetime) -> Desk:
    """Connect and listen; nothing of ours is sent before everything here was checked."""
    raw = await connect(address)
    metered = MeteredStream(raw, limits.UNAUTHENTICATED_BYTES)
    try:
        with broken_is_lost():
            await raw.send_all(encode_preface(Preface(Kind.JOIN, StreamClass.CONTROL)))
            tls = trio.SSLStream(metered, join_client_context())
            await tls.do_handshake()
        return await _recognize(FramedStream(tls, limits.JOIN_FRAME), address, check, now)
    except BaseException:
        await trio.aclose_forcefully(metered)
        raise


async def _recognize(stream: FramedStream, address: str, check: _Check, now: datetime) -> Desk:
    """`PeerError` unless the TLS leaf is a member's certificate of the issuer that `check` accepts."""
    welcome = decode_join(await stream.receive_frame(), Welcome)
    if isinstance(welcome, NotAdmitted):
        raise PeerError("the machine there admits nobody")
    leaf_der = stream.peer_certificate() or b""
    root, issuer, leaf = map(parse_certificate, (welcome.root, welcome.issuer, leaf_der))
    check(root, issuer)
    verify_chain([leaf, issuer], root, now)
    who = peer_identity(leaf)
    if who.role is not Role.MEMBER:
        raise PeerError("a client answers there")
    return Desk(stream, root, issuer, leaf_der, welcome.nonce, who.node_id, address)


async def receive(desk: Desk, expected: type[_M]) -> _M:
    """The next message; `InviteError` when it is a refusal."""
    answer = decode_join(await desk.stream.receive_frame(), expected)
    if isinstance(answer, NotAdmitted):
        raise _refusal(answer.reason)
    return answer


async def ask(
    desk: Desk,
    request: Redeem | Renew | Confirm,
    key: Ed25519PrivateKey,
    now: datetime,
    patience_s: float = limits.JOIN_TIMEOUT_S,
) -> Credentials:
    """Send the request and check what comes back."""
    try:
        with trio.fail_after(patience_s):
            await desk.stream.send_frame(encode_join(request))
            answer = await receive(desk, Admitted)
    except trio.TooSlowError:
        raise LinkLost(f"the issuer did not answer within {patience_s:g} s") from None
    finally:
        await desk.aclose()
    own = parse_certificate(answer.certificate)
    verify_chain([own, desk.issuer], desk.root, now)
    if peer_identity(own).node_id != node_id_of(spki_of(key.public_key())):
        raise PeerError("the issuer certified another key")
    return Credentials(key, (own, desk.issuer), desk.root)


def _refusal(reason: str) -> InviteError:
    known = reason in tuple(JoinRefusal)
    return InviteError(_REFUSALS[JoinRefusal(reason)] if known else "the issuer refused", _ASK_AGAIN)
