"""Members of one mesh with real ports and real TLS, and nothing behind them but what a test gives."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from meshnode.identity.credentials import Credentials
from meshnode.identity.ids import NodeId
from meshnode.io.transport.stream import Stream
from meshnode.io.transport.transport import Handlers, Transport
from meshnode.wire.preface import StreamClass
from tests.identity.mesh import TestMesh


class Member:
    """`handler` gets every accepted stream; what it raises is kept in `raised` and goes on to the transport."""

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        self.transport = Transport(credentials)
        self.port = 0
        self.raised: list[BaseException] = []
        self.ended = trio.Event()
        """Set when a handler came to its end."""

    @property
    def node(self) -> NodeId:
        return self.credentials.node_id

    @property
    def addresses(self) -> tuple[str, ...]:
        return (f"127.0.0.1:{self.port}",)

    async def listen(self, nursery: trio.Nursery, handler: Callable[[Stream], Awaitable[None]]) -> None:
        async def member(stream: Stream) -> None:
            try:
                await handler(stream)
            except BaseException as error:
                self.raised.append(error)
                raise
            finally:
                self.ended.set()

        self.port = await nursery.start(self.transport.serve, "127.0.0.1", 0, Handlers(member))

    async def dial(self, other: Member, stream_class: StreamClass) -> Stream:
        return await self.transport.dial(other.node, other.addresses, stream_class)


def pair() -> tuple[Member, Member]:
    """Two members of a new mesh, the one with the lower id first."""
    mesh = TestMesh()
    low, high = sorted((Member(mesh.node()), Member(mesh.node())), key=lambda member: member.node)
    return low, high
