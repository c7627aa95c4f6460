"""What an attack must not leave behind in real nodes, and the ways to speak to them that an attacker has."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx
import psutil
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.app.authority import NodeAuthority
from meshnode.core.membership.announcement import Body, announce
from meshnode.demo import EXPECTED_ANSWER, QUESTION
from meshnode.errors import LinkLost
from meshnode.identity.credentials import Credentials
from meshnode.identity.ids import NodeId
from meshnode.identity.invites import parse_invite
from meshnode.io.transport.join import redeem
from meshnode.io.transport.stream import Stream
from meshnode.io.transport.tls import join_client_context
from meshnode.io.transport.transport import Transport
from meshnode.wire.messages import Announce, AnyMessage, Introduce, Leave, Ping, Pong, decode, encode
from meshnode.wire.preface import Kind, Preface, StreamClass, encode_preface
from tests.e2e.nodes import WAIT_S, RealMesh, RealNode, until

GROWTH_BYTES = 192 * 2**20
"""Of one node over one test: bodies of 33 MiB and Python's habit of keeping what it had once."""
SPARE_DESCRIPTORS = 4
"""Files that a node opens and closes by itself at any time."""
LAST = 4711
"""The nonce of the ping that ends what an intruder says."""
BUG = re.compile(r"Traceback|could not be handled|\w+(Error|Group|Exception): .*\(\w+\.py:\d+\)")
"""What the log of a node shows of an exception that nobody expected."""


@contextmanager
def unharmed(mesh: RealMesh) -> Iterator[None]:
    """Around an attack: afterwards every node answers, holds what it held before, and logged no bug of its own."""
    before = [Figures.of(node) for node in mesh.nodes]
    yield
    for node, figures in zip(mesh.nodes, before, strict=True):
        assert answers(node) == EXPECTED_ANSWER
        until(f"{node.name} has closed what was opened", lambda n=node, f=figures: Figures.of(n).at_most(f))
        found = BUG.search(node.words())
        assert found is None, node.words()[-4000:]


@dataclass(frozen=True)
class Figures:
    """What a node holds of the machine."""

    descriptors: int
    children: frozenset[int]
    bytes: int

    @staticmethod
    def of(node: RealNode) -> Figures:
        assert node.process is not None
        process = psutil.Process(node.process.pid)
        children = frozenset(child.pid for child in process.children())
        return Figures(process.num_fds(), children, process.memory_info().rss)

    def at_most(self, before: Figures) -> bool:
        return (
            self.descriptors <= before.descriptors + SPARE_DESCRIPTORS
            and self.children == before.children
            and self.bytes <= before.bytes + GROWTH_BYTES
        )


def answers(node: RealNode) -> str:
    """To the question of the demonstration, over a connection of its own."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    response = httpx.post(f"{node.url}/v1/chat/completions", json=body, timeout=WAIT_S)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


# --- strangers ------------------------------------------------------------------------------------------------


def mesh_address(node: RealNode) -> str:
    """host:port of its mesh port."""
    assert node.running is not None
    return f"127.0.0.1:{node.running['mesh_port']}"


def connect(node: RealNode, first: bytes = b"") -> socket.socket:
    """A plain connection to the mesh port that has said `first`."""
    assert node.running is not None
    made = socket.create_connection(("127.0.0.1", node.running["mesh_port"]), timeout=WAIT_S)
    made.sendall(first)
    return made


def is_closed_by_node(connection: socket.socket) -> bool:
    """Wait until the node ends it (it may say something before, such as a TLS alert)."""
    with connection:
        try:
            while connection.recv(65536):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
    return True


def join_tls(node: RealNode) -> ssl.SSLSocket:
    """What a joiner sees: TLS without a certificate of its own, the Welcome not yet read."""
    raw = connect(node, encode_preface(Preface(Kind.JOIN, StreamClass.CONTROL)))
    return join_client_context().wrap_socket(raw)


# --- a member with bad intentions --------------------------------------------------------------------------------


class Intruder:
    """A member of the mesh that joined as everybody does, and then says what it likes."""

    def __init__(self, credentials: Credentials, founder: RealNode) -> None:
        self.credentials = credentials
        self.founder = founder
        self.transport = Transport(credentials)
        self.authority = NodeAuthority(lambda: credentials, lambda: datetime.now(UTC))
        self.sequence = 0

    @staticmethod
    def joins(mesh: RealMesh, role: str = "member") -> Intruder:
        invite = parse_invite(mesh.nodes[0].invite(role=role))
        key = Ed25519PrivateKey.generate()

        async def ask() -> Credentials:
            return (await redeem(invite, key, datetime.now(UTC))).credentials

        return Intruder(trio.run(ask), mesh.nodes[0])

    @property
    def node(self) -> NodeId:
        return self.credentials.node_id

    def announcement(self, **changes: object) -> Announce:
        """The next of its own, with anything in it."""
        self.sequence += 1
        plain = {"mesh": self.authority.mesh, "node": self.node, "incarnation": 1, "sequence": self.sequence}
        plain |= {"name": "intruder", "addresses": ("127.0.0.1:1",), "memory_usable": 0}
        return announce(Body(**{**plain, **changes}), self.authority)

    def introduce(self) -> Introduce:
        return Introduce(self.authority.chain)

    async def dial(self, victim: RealNode, stream_class: StreamClass = StreamClass.CONTROL) -> Stream:
        node = NodeId(victim.status()["node"])
        return await self.transport.dial(node, (mesh_address(victim),), stream_class)

    def act(self, victim: RealNode, does: Callable[[Stream], Awaitable[None]], stream_class: StreamClass) -> None:
        """One stream to `victim`, handed to `does` and closed."""

        async def run() -> None:
            with trio.fail_after(WAIT_S):
                stream = await self.dial(victim, stream_class)
                try:
                    await does(stream)
                finally:
                    await stream.aclose()

        trio.run(run)

    def tell(self, victim: RealNode, *messages: AnyMessage | bytes) -> list[AnyMessage]:
        """Say all that on a CONTROL link; what was heard until the victim had taken it all, or closed."""
        heard: list[AnyMessage] = []

        async def does(stream: Stream) -> None:
            try:
                for message in (*messages, Ping(LAST)):
                    await stream.send_frame(message if isinstance(message, bytes) else encode(message))
                while not (heard and heard[-1] == Pong(LAST)):
                    heard.append(decode(await stream.receive_frame()))
                await stream.send_frame(encode(Leave()))
            except LinkLost:
                pass  # it had enough

        self.act(victim, does, StreamClass.CONTROL)
        return heard

    def was_refused(self, victim: RealNode, *messages: AnyMessage | bytes) -> bool:
        """Whether the victim closed the link over `messages`."""
        heard = self.tell(victim, *messages)
        return not heard or heard[-1] != Pong(LAST)
