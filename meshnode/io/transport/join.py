"""JOIN: an invite against a node certificate.

    issuer -> Welcome(root, issuer, nonce)      joiner checks both pins, the chain, and that the TLS leaf is a
                                                node certificate of that issuer; it has sent nothing so far
    joiner -> Redeem(key, signature, mac)       issuer checks both, marks the invite used ON DISK, then signs
    issuer -> Admitted(certificate)

Invariant: the used mark is durable before the certificate exists.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from datetime import datetime

import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from meshnode.errors import InviteError, LinkLost, MeshError, PeerError
from meshnode.identity.certificates import Authority, Role, make_node
from meshnode.identity.chains import (
    key_bytes,
    mesh_id_of_root,
    parse_certificate,
    peer_identity,
    verify_chain,
)
from meshnode.identity.credentials import Credentials
from meshnode.identity.invite_book import InviteBook, JoinRefusal
from meshnode.identity.invites import Invite, check_not_expired, invite_key, issuer_pin, mesh_pin
from meshnode.identity.keys import public_key_of, spki_of
from meshnode.identity.transcript import NONCE_BYTES, Transcript, fingerprint
from meshnode.io.transport.stream import FramedStream, MeteredStream, broken_is_lost
from meshnode.io.transport.tls import join_client_context
from meshnode.io.transport.transport import connect
from meshnode.wire import limits
from meshnode.wire.join import Admitted, NotAdmitted, Redeem, Welcome, decode_join, encode_join
from meshnode.wire.preface import Kind, Preface, StreamClass, encode_preface

_ASK_AGAIN = "Ask for a new one: `meshnode invite`."

_REFUSALS = {
    JoinRefusal.UNKNOWN: "the issuer does not know this invite",
    JoinRefusal.USED: "this invite was already used by another machine",
    JoinRefusal.EXPIRED: "this invite has expired",
    JoinRefusal.REVOKED: "this invite was revoked",
    JoinRefusal.LOCKED: "this invite is locked after too many wrong attempts",
    JoinRefusal.WRONG_PROOF: "the issuer did not accept this invite's secret",
}


class JoinDesk:
    """The issuer's side: one book, one signer. Give `handle` to `Handlers.join`.

    `persist` makes the book durable (fsync) before it returns; `now` is the wall clock.
    """

    def __init__(
        self,
        credentials: Credentials,
        issuer: Authority,
        book: InviteBook,
        persist: Callable[[InviteBook], Awaitable[None]],
        now: Callable[[], datetime],
    ) -> None:
        self._credentials = credentials
        self._issuer = issuer
        self._persist = persist
        self._now = now
        self._turn = trio.Lock()
        self.book = book

    def renew(self, credentials: Credentials, issuer: Authority) -> None:
        """Show and sign with these from now on."""
        self._credentials = credentials
        self._issuer = issuer

    async def change(self, change: Callable[[InviteBook], InviteBook]) -> InviteBook:
        """Apply `change` (create, revoke) and make it durable."""
        async with self._turn:
            await self._keep(change(self.book))
            return self.book

    async def handle(self, stream: FramedStream) -> None:
        """One JOIN connection; `PeerError` or `LinkLost` when it goes wrong."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        root, leaf = self._credentials.root, self._credentials.chain[0]
        welcome = Welcome(_der(root), _der(self._issuer.certificate), nonce)
        await stream.send_frame(encode_join(welcome))
        asked = decode_join(await stream.receive_frame(), Redeem)
        if isinstance(asked, NotAdmitted):
            raise PeerError("the joiner gave up")
        transcript = Transcript(
            mesh_id_of_root(root), asked.invite_id, nonce, asked.nonce, fingerprint(_der(leaf)), asked.public_key
        )
        transcript.check_signature(asked.signature)
        async with self._turn:
            answer = await self._decide(transcript, asked.mac)
        if isinstance(answer, JoinRefusal):
            await stream.send_frame(encode_join(NotAdmitted(answer.value)))
            raise PeerError(f"a joiner was refused: {answer.value}")
        await stream.send_frame(encode_join(Admitted(answer)))

    async def _decide(self, transcript: Transcript, mac: bytes) -> bytes | JoinRefusal:
        """The certificate (DER) for the transcript's key, or why there is none."""
        now = self._now()
        book, answer = self.book.redeem(transcript, mac, now)
        await self._keep(book)
        if isinstance(answer, JoinRefusal):
            return answer
        key = transcript.public_key
        known = next(a.certificate for a in answer.admitted if a.public_key == key)
        if known:
            return known
        certificate = _der(make_node(self._issuer, public_key_of(key), answer.role, now))
        await self._keep(self.book.certified(answer.invite_id, key, certificate, now))
        return certificate

    async def _keep(self, book: InviteBook) -> None:
        if book != self.book:
            await self._persist(book)
            self.book = book


async def redeem(invite: Invite, key: Ed25519PrivateKey, now: datetime) -> Credentials:
    """Become a member: the first of the invite's addresses that proves to be its issuer decides.

    `InviteError` when the issuer refuses, `LinkLost` when none of the addresses is the issuer.
    """
    check_not_expired(invite, now)
    problems = []
    for address in invite.addresses:
        try:
            with trio.fail_after(limits.JOIN_TIMEOUT_S):
                return await _redeem_at(address, invite, key, now)
        except trio.TooSlowError:
            problems.append(f"{address}: no answer within {limits.JOIN_TIMEOUT_S:g} s")
        except InviteError:
            raise
        except MeshError as problem:
            problems.append(f"{address}: {problem}")
    raise LinkLost(f"the machine that made this invite cannot be reached ({'; '.join(problems)})")


async def _redeem_at(address: str, invite: Invite, key: Ed25519PrivateKey, now: datetime) -> Credentials:
    with trio.fail_after(limits.DIAL_TIMEOUT_S):
        raw = await connect(address)
    metered = MeteredStream(raw, limits.UNAUTHENTICATED_BYTES)
    try:
        with broken_is_lost():
            await raw.send_all(encode_preface(Preface(Kind.JOIN, StreamClass.CONTROL)))
            tls = trio.SSLStream(metered, join_client_context())
            await tls.do_handshake()
        return await _converse(FramedStream(tls, limits.JOIN_FRAME), invite, key, now)
    finally:
        await trio.aclose_forcefully(metered)


async def _converse(stream: FramedStream, invite: Invite, key: Ed25519PrivateKey, now: datetime) -> Credentials:
    welcome = decode_join(await stream.receive_frame(), Welcome)
    if isinstance(welcome, NotAdmitted):
        raise PeerError("the issuer refused before it was asked")
    root, issuer, leaf = _check_issuer(welcome, stream.peer_certificate() or b"", invite, now)
    spki = spki_of(key.public_key())
    nonce = secrets.token_bytes(NONCE_BYTES)
    transcript = Transcript(
        mesh_id_of_root(root), invite.invite_id, welcome.nonce, nonce, fingerprint(_der(leaf)), spki
    )
    mac = transcript.mac(invite_key(invite.secret, invite.invite_id))
    await stream.send_frame(encode_join(Redeem(invite.invite_id, nonce, spki, transcript.sign(key), mac)))
    answer = decode_join(await stream.receive_frame(), Admitted)
    if isinstance(answer, NotAdmitted):
        raise _refusal(answer.reason)
    own = parse_certificate(answer.certificate)
    verify_chain([own, issuer], root, now)
    if key_bytes(own) != spki:
        raise PeerError("the issuer certified another key")
    peer_identity(own)
    return Credentials(key, (own, issuer), root)


def _check_issuer(
    welcome: Welcome, leaf_der: bytes, invite: Invite, now: datetime
) -> tuple[x509.Certificate, x509.Certificate, x509.Certificate]:
    """Root, issuer and TLS leaf, each proven by the invite's pins; `PeerError` otherwise."""
    root, issuer, leaf = map(parse_certificate, (welcome.root, welcome.issuer, leaf_der))
    if mesh_pin(mesh_id_of_root(root)) != invite.mesh_pin or issuer_pin(key_bytes(issuer)) != invite.issuer_pin:
        raise PeerError("another mesh or another node answers there")
    verify_chain([leaf, issuer], root, now)
    if peer_identity(leaf).role is not Role.MEMBER:
        raise PeerError("a client answers there")
    return root, issuer, leaf


def _refusal(reason: str) -> InviteError:
    known = reason in tuple(JoinRefusal)
    return InviteError(_REFUSALS[JoinRefusal(reason)] if known else "the issuer refused this invite", _ASK_AGAIN)


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)
