"""Joining with an invite, over real sockets."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.identity.certificates import Role
from meshnode.identity.chains import key_bytes
from meshnode.identity.invite_book import InviteBook, new_entry
from meshnode.identity.invites import Invite, format_invite, invite_key, issuer_pin, mesh_pin, parse_invite
from meshnode.io.transport.join import JoinDesk, redeem
from meshnode.io.transport.stream import Stream
from meshnode.io.transport.transport import Handlers, Transport
from meshnode.wire.preface import StreamClass
from tests.identity.mesh import TestMesh


@dataclass
class Issuer:
    """A node that admits, its book and what was made durable."""

    mesh: TestMesh = field(default_factory=TestMesh)
    kept: list[InviteBook] = field(default_factory=list)
    port: int = 0

    async def start(self, nursery: trio.Nursery) -> Issuer:
        self.credentials = self.mesh.node()
        self.now = self.mesh.now
        self.desk = JoinDesk(self.credentials, self.mesh.issuer, InviteBook(), self._persist, lambda: self.now)
        handlers = Handlers(self._member, join=self.desk.handle)
        self.port = await nursery.start(Transport(self.credentials).serve, "127.0.0.1", 0, handlers)
        return self

    async def _persist(self, book: InviteBook) -> None:
        await trio.lowlevel.checkpoint()
        self.kept.append(book)

    async def _member(self, stream: Stream) -> None:
        await stream.send_frame(await stream.receive_frame())

    async def invite(self, uses: int = 1, life: timedelta = timedelta(hours=24)) -> Invite:
        invite_id, secret = secrets.token_bytes(8), secrets.token_bytes(16)
        expires = self.now + life
        entry = new_entry(invite_id, invite_key(secret, invite_id), Role.MEMBER, uses, (self.now, expires))
        await self.desk.change(lambda book: book.create(entry))
        pins = mesh_pin(self.credentials.mesh_id), issuer_pin(key_bytes(self.mesh.issuer.certificate))
        text = format_invite(Invite(*pins, invite_id, secret, expires, (f"127.0.0.1:{self.port}",)))
        return parse_invite(text)


async def test_an_invite_makes_a_member_that_others_let_in(nursery: trio.Nursery) -> None:
    issuer = await Issuer().start(nursery)
    joined = await redeem(await issuer.invite(), Ed25519PrivateKey.generate(), datetime.now(UTC))
    address = f"127.0.0.1:{issuer.port}"
    stream = await Transport(joined).dial(issuer.credentials.node_id, [address], StreamClass.CONTROL)
    await stream.send_frame(b"x")
    assert await stream.receive_frame() == b"x"
    await stream.aclose()
