"""A node of protocol version 3 (it speaks 2 to 3) beside neighbours of other versions, over real TLS."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import inspect
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from meshnode.app.control import ControlLinks
from meshnode.app.passing import answer
from meshnode.core.node.events import Event, LinkClosed, LinkOpened, Received
from meshnode.identity.certificates import Role
from meshnode.io.artifacts import ArtifactStore, Library, serve_bulk
from meshnode.io.transport import join, join_desk
from meshnode.io.transport.stream import FramedStream, Stream
from meshnode.io.transport.transport import Handlers, Transport
from meshnode.wire import preface
from meshnode.wire.messages import Have, Ping, Unknown
from meshnode.wire.preface import StreamClass
from tests.identity.mesh import TestMesh
from tests.io.transport.issuer import Issuer
from tests.proto.codecs import KINDS, read
from tests.proto.neighbours import LATER, Neighbour, newer, older
from tests.proto.test_vectors import VECTORS
from tools.contract.jsonform import from_json

VERSION, OLDEST = 3, 2
SURPLUS = tuple(LATER.values())
SPEAKING = {"older": (1, 2, (), older), "same": (2, 3, (), lambda value, _: value), "newer": (3, 4, SURPLUS, newer)}
"""Neighbours that have a version in common with the node: range, what they add to HELLO, how they write messages."""
STRANGE = {"too old": (1, 1), "too new": (4, 5)}
CONTROL = [(vector["message"], from_json(vector["decoded"])) for name, vector in VECTORS if name == "control"]
LATER_OP = {"op": "sparkle", "ids": [bytes(16)], **LATER}


@pytest.fixture(autouse=True)
def node_of_version_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preface, "PROTOCOL", VERSION)
    monkeypatch.setattr(preface, "PROTOCOL_OLDEST", OLDEST)


class Node:
    """The node under test: its transport and its CONTROL links; what its mediator would be told is in `events`."""

    def __init__(self, mesh: TestMesh, nursery: trio.Nursery) -> None:
        self.mesh = mesh
        self.credentials = mesh.node()
        self.node = self.credentials.node_id
        self.transport = Transport(self.credentials)
        self.links = ControlLinks(self.transport, self.node, self._post)
        self.events: list[Event] = []
        self._nursery = nursery
        self._news = trio.Event()

    async def listen(self, handler: Callable[[Stream], Any] | None = None) -> int:
        handlers = Handlers(handler or self.links.accepted)
        port: int = await self._nursery.start(self.transport.serve, "127.0.0.1", 0, handlers)
        return port

    async def until(self, event: Event) -> None:
        while event not in self.events:
            await self._news.wait()

    async def first(self) -> Event:
        while not self.events:
            await self._news.wait()
        return self.events[0]

    async def _post(self, event: Event) -> None:
        await trio.lowlevel.checkpoint()
        self.events.append(event)
        news, self._news = self._news, trio.Event()
        news.set()


@pytest.fixture
async def closing() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def node(nursery: trio.Nursery) -> Node:
    return Node(TestMesh(), nursery)


Meet = Callable[[Neighbour], Any]


@pytest.fixture(params=["the neighbour dials", "the node dials"])
def meet(request: pytest.FixtureRequest, node: Node, nursery: trio.Nursery, closing: AsyncExitStack) -> Meet:
    async def meet(neighbour: Neighbour) -> FramedStream:
        if request.param == "the neighbour dials":
            stream = await neighbour.dial(await node.listen())
        else:
            listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
            closing.push_async_callback(listener.aclose)
            address = f"127.0.0.1:{listener.socket.getsockname()[1]}"
            nursery.start_soon(node.links.dial, neighbour.node, (address,))
            stream = await neighbour.accept(listener)
        closing.push_async_callback(stream.aclose)
        return stream

    return meet


async def heard(stream: FramedStream) -> Any:
    return msgpack.unpackb(await stream.receive_frame())


async def say(stream: FramedStream, message: Any) -> None:
    await stream.send_frame(msgpack.packb(message))


@pytest.mark.parametrize("version", SPEAKING)
async def test_a_neighbour_that_shares_a_version_is_understood(version: str, node: Node, meet: Meet) -> None:
    lowest, highest, surplus, form = SPEAKING[version]
    neighbour = Neighbour(node.mesh.node(), lowest, highest, surplus)
    stream = await meet(neighbour)
    assert neighbour.answer[:1] + neighbour.answer[2:] == [
        "hello",
        OLDEST,
        VERSION,
        node.credentials.mesh_id,
        node.node,
    ]
    expected = [LinkOpened(neighbour.node)]
    for op, message in CONTROL:
        sent = form(message, inspect.type_info(KINDS["control", op]))
        await say(stream, sent)
        expected.append(Received(neighbour.node, read("control", op, msgpack.packb(sent))))
    # Two versions of one message may be the same to an older neighbour: what is waited for comes only once.
    await say(stream, {"op": "ping", "nonce": 2**40})
    expected.append(Received(neighbour.node, Ping(2**40)))
    await node.until(expected[-1])
    assert node.events == expected


@pytest.mark.parametrize("version", SPEAKING)
async def test_an_unknown_op_is_answered_and_the_link_stays(version: str, node: Node, meet: Meet) -> None:
    neighbour = Neighbour(node.mesh.node(), *SPEAKING[version][:3])
    stream = await meet(neighbour)
    await say(stream, LATER_OP)
    assert await heard(stream) == {"op": "unknown", "unknown_op": "sparkle"}
    await say(stream, {"op": "ping", "nonce": 1})
    await node.until(Received(neighbour.node, Ping(1)))
    assert not any(isinstance(event, LinkClosed) for event in node.events)


@pytest.mark.parametrize("version", SPEAKING)
async def test_a_neighbour_that_lacks_an_op_says_so_and_is_not_answered(version: str, node: Node, meet: Meet) -> None:
    neighbour = Neighbour(node.mesh.node(), *SPEAKING[version][:3])
    stream = await meet(neighbour)
    await node.until(LinkOpened(neighbour.node))
    node.links.send(neighbour.node, Have((bytes(16),)))
    assert await heard(stream) == {"op": "have", "ids": [bytes(16)]}
    await say(stream, {"op": "unknown", "unknown_op": "have"})
    await node.until(Received(neighbour.node, Unknown("have")))
    node.links.send(neighbour.node, Ping(2))
    assert await heard(stream) == {"op": "ping", "nonce": 2}, "the next that is said, with nothing in between"


@pytest.mark.parametrize("version", STRANGE)
async def test_without_a_common_version_both_ends_are_told(version: str, node: Node, meet: Meet) -> None:
    lowest, highest = STRANGE[version]
    neighbour = Neighbour(node.mesh.node(), lowest, highest, SURPLUS)
    await meet(neighbour)
    reason = f"no common protocol version: the peer speaks {lowest} to {highest}, this node {VERSION}"
    if neighbour.answer[0] == "refused":
        assert neighbour.answer == ["refused", reason, False]
        assert node.events == []
    else:
        assert neighbour.answer[2:4] == [OLDEST, VERSION], "whoever accepts knows the range, and refuses"
        first = await node.first()
        assert isinstance(first, LinkClosed)
        assert reason in first.reason


async def test_a_refusal_of_another_version_is_shown(
    node: Node, nursery: trio.Nursery, closing: AsyncExitStack
) -> None:
    class Refusing(Neighbour):
        async def _greet(self, stream: FramedStream, preface: bytes) -> None:
            await say(
                stream, ["refused", "no common protocol version: the peer speaks 2 to 3, this node 9", False, *SURPLUS]
            )

    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    closing.push_async_callback(listener.aclose)
    neighbour = Refusing(node.mesh.node(), 8, 9)
    address = f"127.0.0.1:{listener.socket.getsockname()[1]}"
    nursery.start_soon(node.links.dial, neighbour.node, (address,))
    closing.push_async_callback((await neighbour.accept(listener)).aclose)
    first = await node.first()
    assert isinstance(first, LinkClosed)
    assert "the peer refused: no common protocol version: the peer speaks 2 to 3, this node 9" in first.reason


async def test_bulk_answers_what_it_knows_and_refuses_the_rest(
    node: Node, closing: AsyncExitStack, tmp_path: Path
) -> None:
    library = Library(ArtifactStore(tmp_path, layouts=None))

    async def serve(stream: Stream) -> None:
        await serve_bulk(stream, library)

    neighbour = Neighbour(node.mesh.node(), 3, 4, SURPLUS)
    stream = await neighbour.dial(await node.listen(serve), StreamClass.BULK)
    closing.push_async_callback(stream.aclose)
    for request, reason in (
        (LATER_OP, "unknown_op"),
        (LATER | {"op": "get_manifest", "digest": "ab" * 32}, "no_manifest"),
        (LATER_OP, "unknown_op"),
    ):
        await say(stream, request)
        assert await heard(stream) == {"op": "refused", "reason": reason}


async def test_a_passed_request_with_fields_of_a_later_version_is_answered(node: Node, closing: AsyncExitStack) -> None:
    async def shout(request: Request) -> PlainTextResponse:
        return PlainTextResponse((await request.body()).upper())

    app = Starlette(routes=[Route("/v1/x", shout, methods=["POST"])])

    async def serve(stream: Stream) -> None:
        await answer(stream, app)

    neighbour = Neighbour(node.mesh.node(), 3, 4, SURPLUS)
    stream = await neighbour.dial(await node.listen(serve), StreamClass.REQUEST)
    closing.push_async_callback(stream.aclose)
    await say(stream, LATER | {"method": "POST", "path": "/v1/x", "headers": [], "body_bytes": 5})
    await stream.send_frame(b"hello")
    assert (await heard(stream))["status"] == 200
    assert await stream.receive_frame() == b"HELLO"
    assert await stream.receive_frame() == b""


@pytest.mark.parametrize("side", [join, join_desk], ids=["joiner", "issuer"])
async def test_a_join_with_items_of_a_later_version_goes_through(
    side: Any, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, later = side.encode_join, []

    def encode_later(message: Any) -> bytes:
        later.append(message)
        return msgpack.packb([*msgpack.unpackb(encode(message)), *SURPLUS])

    monkeypatch.setattr(side, "encode_join", encode_later)
    issuer = await Issuer().start(nursery)
    joined = await join.redeem(await issuer.invite(), Ed25519PrivateKey.generate(), issuer.now)
    assert joined.credentials.role is Role.MEMBER
    assert later, "something was said in the later form"
