"""The issuer's side of JOIN: invites against node certificates, renewals, and joins by number.

Invariant: the used mark is durable before the certificate exists.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import NoReturn

import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from meshnode.errors import ConfigError, PeerError
from meshnode.identity.certificates import Authority, Role, make_node
from meshnode.identity.chains import check_renewable, key_bytes, mesh_id_of_root, parse_certificate
from meshnode.identity.credentials import Credentials
from meshnode.identity.domains import Domain
from meshnode.identity.ids import NodeId, node_id_of
from meshnode.identity.invite_book import InviteBook, JoinRefusal, check_terms, new_entry
from meshnode.identity.invites import (
    INVITE_ID_BYTES,
    SECRET_BYTES,
    Invite,
    format_invite,
    invite_key,
    issuer_pin,
    mesh_pin,
)
from meshnode.identity.keys import public_key_of
from meshnode.identity.transcript import NO_INVITE, NONCE_BYTES, Transcript, fingerprint
from meshnode.io.transport.comparison_desk import ComparisonDesk
from meshnode.io.transport.stream import JoinStream
from meshnode.wire.join import Admitted, Approach, NotAdmitted, Redeem, Renew, Welcome, decode_request, encode_join


class JoinDesk:
    """One book, one signer. Give `handle` to `Handlers.join`.

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
        self.comparisons: ComparisonDesk | None = None
        """Set where machines of the local network may ask without an invite."""
        self.book = book
        self.barred: Callable[[NodeId], bool] = lambda node: False
        """Whether a node was revoked: its key gets no certificate, by invite, number or renewal."""
        self.revoked: Callable[[NodeId], bool] = lambda issuer: False
        """Whether the root revoked an issuer: what it signed is not renewed, and if it is this one, nobody gets in."""

    def renew(self, credentials: Credentials, issuer: Authority) -> None:
        """Show and sign with these from now on."""
        self._credentials = credentials
        self._issuer = issuer

    async def invite(self, addresses: Sequence[str], uses: int, life: timedelta, role: Role) -> Invite:
        """A new invite that leads to `addresses` (`host:port`, 1 to 3), durable when this returns.

        `ConfigError` (`InviteError` for the addresses) when it cannot be made.
        """
        self.require_valid()
        check_terms(uses, life)  # before anything is computed with it: no calendar holds some of them
        now = self._now().replace(microsecond=0)
        invite_id, secret = secrets.token_bytes(INVITE_ID_BYTES), secrets.token_bytes(SECRET_BYTES)
        pins = mesh_pin(self._credentials.mesh_id), issuer_pin(key_bytes(self._issuer.certificate))
        invite = Invite(*pins, invite_id, secret, now + life, tuple(addresses))
        format_invite(invite)  # refuses what does not fit, before anything is kept
        entry = new_entry(invite_id, invite_key(secret, invite_id), role, uses, (now, now + life))
        await self.change(lambda book: book.create(entry))
        return invite

    def require_valid(self) -> None:
        """`ConfigError` when what is signed here would be worth nothing."""
        ended = self._issuer.certificate.not_valid_after_utc
        if self.revoked(self.issuer):
            raise ConfigError("the root of this mesh revoked the issuer on this node", "Invite from another issuer.")
        if self._now() > ended:
            raise ConfigError(
                f"this node's certificate as an issuer ended on {ended:%Y-%m-%d}",
                "Run `meshnode issuer add` for it again, on the machine that holds the root key.",
            )

    @property
    def issuer(self) -> NodeId:
        """The hash of the key that signs here."""
        return node_id_of(key_bytes(self._issuer.certificate))

    async def change(self, change: Callable[[InviteBook], InviteBook]) -> InviteBook:
        """Apply `change` (create, revoke) and make it durable."""
        async with self._turn:
            await self._keep(change(self.book))
            return self.book

    async def handle(self, stream: JoinStream) -> None:
        """One JOIN connection; `PeerError` or `LinkLost` when it goes wrong."""
        if self.revoked(self.issuer):
            await refuse(stream)
        nonce = secrets.token_bytes(NONCE_BYTES)
        leaf = _der(self._credentials.chain[0])
        welcome = Welcome(_der(self._credentials.root), _der(self._issuer.certificate), nonce)
        await stream.send_frame(encode_join(welcome))
        match decode_request(await stream.receive_frame()):
            case Redeem() as asked:
                answer = await self._redeem(asked, nonce, leaf)
            case Renew() as asked:
                answer = self._renew(asked, nonce, leaf)
            case Approach() as asked:
                answer = await self._meet(stream, asked, leaf)
        if isinstance(answer, JoinRefusal):
            await stream.send_frame(encode_join(NotAdmitted(answer.value)))
            raise PeerError(f"a joiner was refused: {answer.value}")
        await stream.send_frame(encode_join(Admitted(answer)))

    async def _redeem(self, asked: Redeem, nonce: bytes, leaf: bytes) -> bytes | JoinRefusal:
        """The certificate (DER) for the joiner's key, or why there is none."""
        mesh_id = mesh_id_of_root(self._credentials.root)
        key = asked.public_key
        transcript = Transcript(mesh_id, asked.invite_id, nonce, asked.nonce, fingerprint(leaf), key)
        transcript.check_signature(asked.signature)
        if refusal := self.refusal(key):
            return refusal
        async with self._turn:
            now = self._now()
            book, answer = self.book.redeem(transcript, asked.mac, now)
            await self._keep(book)
            if isinstance(answer, JoinRefusal):
                return answer
            known = next(a.certificate for a in answer.admitted if a.public_key == key)
            if known:
                return known
            certificate = _der(make_node(self._issuer, public_key_of(key), answer.role, now))
            await self._keep(self.book.certified(answer.invite_id, key, certificate, now))
            return certificate

    async def _meet(self, stream: JoinStream, asked: Approach, leaf: bytes) -> bytes | JoinRefusal:
        if self.comparisons is None:
            return JoinRefusal.CLOSED
        mesh = mesh_id_of_root(self._credentials.root)
        return await self.comparisons.meet(stream, asked, mesh, leaf, self)

    def refusal(self, key: bytes) -> JoinRefusal | None:
        """Why `key` (SPKI) gets no certificate whatever it proves, if so."""
        return JoinRefusal.BARRED if self.barred(node_id_of(key)) else None

    def certify(self, key: bytes) -> bytes:
        """A member's certificate (DER) for `key`, which a person here has approved."""
        return _der(make_node(self._issuer, public_key_of(key), Role.MEMBER, self._now()))

    def _renew(self, asked: Renew, nonce: bytes, leaf: bytes) -> bytes | JoinRefusal:
        old = parse_certificate(asked.certificate)
        key, now = key_bytes(old), self._now()
        mesh_id = mesh_id_of_root(self._credentials.root)
        proof = Transcript(mesh_id, NO_INVITE, nonce, asked.nonce, fingerprint(leaf), key, Domain.RENEWAL)
        proof.check_signature(asked.signature)
        if refusal := self.refusal(key):
            return refusal
        issuer = parse_certificate(asked.issuer) if asked.issuer else self._issuer.certificate
        if self.revoked(node_id_of(key_bytes(issuer))):
            return JoinRefusal.BARRED
        try:
            role = check_renewable(old, issuer, self._credentials.root, now)
        except PeerError:
            return JoinRefusal.NOT_RENEWABLE
        return _der(make_node(self._issuer, public_key_of(key), role, now))

    async def _keep(self, book: InviteBook) -> None:
        if book == self.book:
            return
        # What is on disk and what is in memory must not part because a joiner went away.
        with trio.CancelScope(shield=True):
            await self._persist(book)
        self.book = book


async def refuse(stream: JoinStream) -> NoReturn:
    """Where nobody is let in. Raises `PeerError`."""
    await stream.send_frame(encode_join(NotAdmitted(JoinRefusal.CLOSED.value)))
    raise PeerError("a joiner was refused: this node is no issuer, or a revoked one")


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)
