"""A node that admits others, for tests: real port, real TLS, a book kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import trio

from meshnode.identity.certificates import Role
from meshnode.identity.invite_book import InviteBook
from meshnode.identity.invites import Invite, format_invite, parse_invite
from meshnode.io.transport.join_desk import JoinDesk
from meshnode.io.transport.stream import Stream
from meshnode.io.transport.transport import Handlers, Transport
from tests.identity.mesh import TestMesh


class Issuer:
    """`kept` is what was made durable, in order; members are echoed."""

    def __init__(self) -> None:
        self.mesh = TestMesh()
        self.now = self.mesh.now
        self.credentials = self.mesh.node()
        self.kept: list[InviteBook] = []
        self.desk = JoinDesk(self.credentials, self.mesh.issuer, InviteBook(), self._persist, lambda: self.now)
        self.transport = Transport(self.credentials)
        self.port = 0

    async def start(self, nursery: trio.Nursery) -> Issuer:
        handlers = Handlers(echo, join=self.desk.handle)
        self.port = await nursery.start(self.transport.serve, "127.0.0.1", 0, handlers)
        return self

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def invite(
        self, uses: int = 1, life: timedelta = timedelta(hours=24), addresses: Sequence[str] = ()
    ) -> Invite:
        """As pasted: formatted and parsed."""
        made = await self.desk.invite(addresses or [self.address], uses, life, Role.MEMBER)
        return parse_invite(format_invite(made))

    async def _persist(self, book: InviteBook) -> None:
        await trio.lowlevel.checkpoint()
        self.kept.append(book)


async def echo(stream: Stream) -> None:
    """Send every frame back."""
    while True:
        await stream.send_frame(await stream.receive_frame())
