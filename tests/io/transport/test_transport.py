"""Dialing and accepting with real sockets and real TLS."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import timedelta

import msgspec
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from trio.testing import MockClock, wait_all_tasks_blocked

from meshnode.errors import Barred, ConfigError, LinkLost, PeerError
from meshnode.identity.certificates import Authority, Role, make_node
from meshnode.identity.chains import PeerIdentity, key_bytes
from meshnode.identity.credentials import Credentials
from meshnode.identity.ids import mesh_id_of, node_id_of
from meshnode.io.transport.stream import FramedStream, MeteredStream, Stream
from meshnode.io.transport.tls import join_client_context, member_context
from meshnode.io.transport.transport import Handlers, Transport, _listen, connect
from meshnode.wire import limits
from meshnode.wire.framing import encode_frame
from meshnode.wire.preface import (
    PREFACE_BYTES,
    Kind,
    Preface,
    StreamClass,
    decode_hello,
    encode_hello,
    encode_preface,
    hello,
)
from tests.identity.mesh import TestMesh
from tests.identity.mutate import mutations
from tests.io.transport.issuer import echo

WEEK = timedelta(days=7)
CONTROL = Preface(Kind.MEMBER, StreamClass.CONTROL)


@dataclass
class Node:
    """A listening member; `streams` are those its handler got."""

    credentials: Credentials
    transport: Transport
    port: int
    streams: list[Stream]
    opened: AsyncExitStack
    """What this test opened towards the node; closed at its end."""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def dial(self, credentials: Credentials, stream_class: StreamClass = StreamClass.CONTROL) -> Stream:
        stream = await Transport(credentials).dial(self.credentials.node_id, [self.address], stream_class)
        self.opened.push_async_callback(stream.aclose)
        return stream

    async def connect(self) -> trio.SocketStream:
        """A bare connection."""
        return await self.opened.enter_async_context(await trio.open_tcp_stream("127.0.0.1", self.port))

    async def approach(self, credentials: Credentials | None) -> FramedStream:
        """A connection by hand: preface and TLS are done, HELLO is up to the caller."""
        raw = await self.connect()
        await raw.send_all(encode_preface(CONTROL))
        context = join_client_context() if credentials is None else member_context(False, credentials)
        tls = trio.SSLStream(MeteredStream(raw, limits.UNAUTHENTICATED_BYTES), context)
        await tls.do_handshake()
        return FramedStream(tls, limits.HELLO_FRAME)


@pytest.fixture
def mesh() -> TestMesh:
    return TestMesh()


Start = Callable[..., Awaitable[Node]]


@pytest.fixture
async def opened() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def start(nursery: trio.Nursery, mesh: TestMesh, opened: AsyncExitStack) -> Start:
    async def start(credentials: Credentials | None = None, handler=echo, **others) -> Node:
        own = credentials or mesh.node()
        node = Node(own, Transport(own), 0, [], opened)

        async def member(stream: Stream) -> None:
            node.streams.append(stream)
            await handler(stream)

        node.port = await nursery.start(node.transport.serve, "127.0.0.1", 0, Handlers(member, **others))
        return node

    return start


async def test_two_members_exchange_frames_and_know_each_other(mesh: TestMesh, start: Start) -> None:
    here, there = mesh.node(Role.CLIENT), await start()
    stream = await there.dial(here, StreamClass.REQUEST)
    await stream.send_frame(b"hello")
    assert await stream.receive_frame() == b"hello"
    assert (stream.peer.node_id, stream.peer.role) == (there.credentials.node_id, Role.MEMBER)
    theirs = there.streams[0]
    assert (theirs.peer.node_id, theirs.peer.role) == (here.node_id, Role.CLIENT)
    assert theirs.stream_class is StreamClass.REQUEST
    assert stream.frame_limit == theirs.frame_limit == limits.REQUEST_FRAME


async def test_small_packets_leave_at_once_on_both_ends(mesh: TestMesh, start: Start) -> None:
    there = await start()
    stream = await there.dial(mesh.node())
    await wait_all_tasks_blocked()
    for end in (stream, there.streams[0]):
        plain = end._tls.transport_stream._stream.socket
        assert plain.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert plain.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), "an end that has no power says nothing"


async def refuses(node: Node, credentials: Credentials, message: str) -> None:
    """`credentials` do not get in, and no handler hears of them."""
    with pytest.raises(PeerError, match=message):
        await node.dial(credentials)
    assert node.streams == []


async def test_a_member_of_another_mesh_is_refused_on_both_ends(mesh: TestMesh, start: Start) -> None:
    stranger = TestMesh().node()
    await refuses(await start(), stranger, "certificate is refused")
    # The dialer trusts this mesh and shows a chain of another: the acceptor refuses, and the dialer hears of it.
    await refuses(await start(), replace(stranger, root=mesh.root.certificate), "unknown ca")


async def test_expired_members_are_refused_on_both_ends(mesh: TestMesh, start: Start) -> None:
    old = mesh.node(now=mesh.now - 2 * WEEK)
    await refuses(await start(), old, "certificate expired")
    await refuses(await start(old), mesh.node(), "certificate has expired")


async def test_another_node_at_the_address_is_refused(mesh: TestMesh, start: Start) -> None:
    wanted, other = mesh.node(), await start()
    with pytest.raises(PeerError, match="answers there"):
        await Transport(mesh.node()).dial(wanted.node_id, [other.address], StreamClass.CONTROL)
    assert other.streams == []


async def test_a_member_minted_by_a_member_is_refused(mesh: TestMesh, start: Start) -> None:
    member, fresh = mesh.node(), Ed25519PrivateKey.generate()
    minted = make_node(Authority(member.chain[0], member.key), fresh.public_key(), Role.MEMBER, mesh.now)
    await refuses(await start(), replace(member, key=fresh, chain=(minted, *member.chain)), "certificate|closed")


async def test_without_a_certificate_nobody_gets_in(start: Start) -> None:
    node = await start()
    stream = await node.approach(None)
    with pytest.raises(PeerError, match="certificate required"):
        await stream.receive_frame()
    assert node.streams == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preface": encode_preface(Preface(Kind.MEMBER, StreamClass.BULK))}, "repeat the preface"),
        ({"mesh_id": mesh_id_of(b"x")}, "another mesh"),
        ({"node_id": mesh_id_of(b"x")}, "another node"),
        ({"protocol": 9, "protocol_oldest": 8}, "no common protocol version"),
    ],
)
async def test_a_hello_that_differs_is_refused_with_the_reason(
    mesh: TestMesh, start: Start, changes: dict[str, object], message: str
) -> None:
    node, me = await start(), mesh.node()
    stream = await node.approach(me)
    ours = msgspec.structs.replace(hello(CONTROL, me.mesh_id, me.node_id), **changes)
    await stream.send_frame(encode_hello(ours))
    assert message in decode_hello(await stream.receive_frame()).reason
    with pytest.raises(LinkLost):
        await stream.receive_frame()
    assert node.streams == []


async def test_garbage_for_hello_ends_the_connection_and_not_the_node(mesh: TestMesh, start: Start) -> None:
    node, me = await start(), mesh.node()
    good = encode_frame(encode_hello(hello(CONTROL, me.mesh_id, me.node_id)), limits.HELLO_FRAME)
    for data in (b"\xff" * 64, b"\0\0\0\0", good[:9], *mutations([good], rounds=10)):
        stream = await node.approach(me)
        await stream.send_bytes(data)
        await stream.aclose()
    await node.dial(me)


async def test_garbage_for_a_preface_ends_the_connection_and_not_the_node(mesh: TestMesh, start: Start) -> None:
    node, draw = await start(), random.Random(3)
    for length in (0, 1, 23, 24, 25, 500):
        raw = await node.connect()
        await raw.send_all(draw.randbytes(length))
        if length < PREFACE_BYTES:
            await raw.send_eof()
        assert await closed(raw)
    for kind in (Kind.RELAY, Kind.STAGE, Kind.JOIN):  # well-formed, but nobody here serves them
        raw = await node.connect()
        await raw.send_all(
            encode_preface(Preface(kind, StreamClass.ACTIVATION if kind is Kind.STAGE else CONTROL.stream_class))
        )
        assert await closed(raw)
    garbled = await node.connect()
    await garbled.send_all(encode_preface(CONTROL) + draw.randbytes(4096))
    assert await closed(garbled)
    await node.dial(mesh.node())
    counts = node.transport.statistics()
    assert counts["accept_peer"] + counts["accept_link_lost"] == 10


async def closed(raw: trio.SocketStream) -> bool:
    """The other side ended it, after whatever alert it sent."""
    try:
        while await raw.receive_some(4096):
            pass
    except trio.BrokenResourceError:
        pass
    return True


async def test_whoever_says_nothing_is_dropped_after_five_seconds(start: Start, mock_clock: MockClock) -> None:
    node = await start()
    silent = await node.connect()
    halting = await node.connect()
    await halting.send_all(encode_preface(CONTROL))
    await wait_all_tasks_blocked(0.01)
    assert node.transport.statistics()["handshakes_now"] == 2
    mock_clock.jump(limits.PREFACE_TIMEOUT_S)
    assert await closed(silent)
    assert await closed(halting)
    assert node.transport.statistics()["accept_timed_out"] == 2


async def test_why_nobody_answers_is_told_as_it_was() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(LinkLost, match="the connection was refused"):
            await connect(f"127.0.0.1:{nobody.getsockname()[1]}")
    with pytest.raises(LinkLost) as unreachable:  # no system sends a stream to everybody
        await connect("255.255.255.255:9")
    assert "refused" not in str(unreachable.value)


async def test_one_address_cannot_take_all_handshakes(mesh: TestMesh, start: Start, mock_clock: MockClock) -> None:
    node = await start()
    silent = [await node.connect() for _ in range(limits.HANDSHAKES_PER_ADDRESS)]
    await wait_all_tasks_blocked(0.01)
    with pytest.raises(LinkLost):
        await node.dial(mesh.node())
    for raw in silent:
        await raw.aclose()
    await wait_all_tasks_blocked(0.01)
    await node.dial(mesh.node())


async def test_one_member_cannot_take_all_streams(
    mesh: TestMesh, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STREAMS_PER_PEER", 2)
    node, greedy = await start(), mesh.node()
    for _ in range(2):
        await node.dial(greedy)
    with pytest.raises(PeerError, match="too many"):
        await node.dial(greedy)
    await node.dial(mesh.node())


async def test_a_burst_of_dials_waits_for_its_turn_and_all_get_in(mesh: TestMesh, start: Start) -> None:
    node = await start()
    dialer, address = Transport(mesh.node()), node.address
    streams: list[Stream] = []

    async def dial() -> None:
        stream = await dialer.dial(node.credentials.node_id, [address], StreamClass.REQUEST)
        node.opened.push_async_callback(stream.aclose)
        streams.append(stream)

    async with trio.open_nursery() as nursery:
        for _ in range(3 * limits.HANDSHAKES_PER_ADDRESS):
            nursery.start_soon(dial)
    assert len(streams) == 3 * limits.HANDSHAKES_PER_ADDRESS
    assert dialer._dialing == {}


async def test_waiting_behind_a_peer_that_does_not_answer_ends(mesh: TestMesh, mock_clock: MockClock) -> None:
    with socket.socket() as mute:  # the kernel accepts, nobody answers
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        dialer, target, problems = Transport(mesh.node()), mesh.node().node_id, []

        async def dial() -> None:
            with pytest.raises(LinkLost) as caught:
                await dialer.dial(target, [address], StreamClass.CONTROL)
            problems.append(str(caught.value))

        async with trio.open_nursery() as nursery:
            for _ in range(limits.DIALS_PER_PEER + 1):
                nursery.start_soon(dial)
            await wait_all_tasks_blocked(0.01)
            mock_clock.jump(limits.DIAL_TIMEOUT_S)
    assert sorted("others dial" in problem for problem in problems) == [False, False, True]


async def test_an_error_of_one_handler_is_counted_and_ends_its_stream_only(mesh: TestMesh, start: Start) -> None:
    async def grumpy(stream: Stream) -> None:
        raise PeerError((await stream.receive_frame()).decode())

    node = await start(handler=grumpy)
    for _ in range(2):
        stream = await node.dial(mesh.node())
        await stream.send_frame(b"nonsense")
        with pytest.raises(LinkLost):
            await stream.receive_frame()
    await wait_all_tasks_blocked(0.01)
    assert node.transport.statistics()["accept_peer"] == 2


async def test_a_stage_socket_is_handed_on_right_behind_the_preface(mesh: TestMesh, start: Start) -> None:
    sender, receiver = trio.open_memory_channel[tuple[bytes, socket.socket]](1)

    async def stage(token: bytes, plain: socket.socket) -> None:
        await sender.send((token, plain))

    node = await start(stage=stage)
    with await Transport(mesh.node()).dial_stage((node.address,), b"t" * 16) as mine:
        mine.sendall(b"first bytes of TLS")
        token, theirs = await receiver.receive()
        with theirs:
            assert token == b"t" * 16
            assert theirs.recv(100) == b"first bytes of TLS"
            for end in (mine, theirs):
                assert end.getblocking()
                assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_a_stage_is_reached_beside_addresses_that_never_answer_and_hears_its_token_once(
    mesh: TestMesh, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four container bridges, one after the other, would take longer than a pipeline has to connect."""
    heard: list[bytes] = []
    arrived = trio.Event()
    connect = trio.open_tcp_stream

    async def stage(token: bytes, plain: socket.socket) -> None:
        heard.append(token)
        plain.close()
        arrived.set()

    async def swallowed(host: str, port: int) -> trio.SocketStream:
        if host != "127.0.0.1":
            await trio.sleep_forever()
        return await connect(host, port)

    node = await start(stage=stage)
    monkeypatch.setattr(trio, "open_tcp_stream", swallowed)
    addresses = (*(f"172.17.0.{number}:8420" for number in range(1, 5)), node.address, node.address)
    with trio.fail_after(limits.DIAL_TIMEOUT_S), await Transport(mesh.node()).dial_stage(addresses, b"t" * 16):
        await arrived.wait()
    assert heard == [b"t" * 16]


async def test_a_stage_at_a_dead_address_is_a_lost_link(mesh: TestMesh) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(LinkLost):
            await Transport(mesh.node()).dial_stage((f"127.0.0.1:{unused.getsockname()[1]}",), bytes(16))


async def test_a_node_that_keeps_to_its_network_dials_nothing_else(
    mesh: TestMesh, start: Start, opened: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, homely, dialed = await start(), Transport(mesh.node(), lan_only=True), []
    connect = trio.open_tcp_stream

    async def spy(host: str, port: int) -> trio.SocketStream:
        dialed.append(host)
        return await connect(host, port)

    monkeypatch.setattr(trio, "open_tcp_stream", spy)
    outside = ["8.8.8.8:8420", "[2001:db8::1]:8420", "[::ffff:8.8.8.8]:8420", f"localhost:{node.port}"]
    with pytest.raises(LinkLost, match="outside the local network"):
        await homely.dial(node.credentials.node_id, outside, StreamClass.CONTROL)
    with pytest.raises(LinkLost, match="outside the local network"):
        await homely.dial_stage(outside[:1], bytes(16))
    addresses = [*outside, node.address]
    stream = await homely.dial(node.credentials.node_id, addresses, StreamClass.CONTROL)
    opened.push_async_callback(stream.aclose)
    assert dialed == ["127.0.0.1"]


async def test_new_streams_show_renewed_certificates(mesh: TestMesh, start: Start) -> None:
    node = await start()
    own = make_node(mesh.issuer, node.credentials.key.public_key(), Role.MEMBER, mesh.now + timedelta(hours=12))
    before = await node.dial(mesh.node())
    node.transport.renew(replace(node.credentials, chain=(own, mesh.issuer.certificate)))
    after = await node.dial(mesh.node())
    assert after.peer.expires > before.peer.expires
    await before.send_frame(b"still there")
    assert await before.receive_frame() == b"still there"


async def test_a_port_that_is_taken_is_told(mesh: TestMesh, start: Start) -> None:
    node = await start()
    with pytest.raises(ConfigError, match=f"port {node.port}") as caught:
        await Transport(mesh.node()).serve("127.0.0.1", node.port, Handlers(echo))
    assert "--port" in caught.value.hint


async def test_any_free_port_is_the_same_one_for_every_address_family() -> None:
    listeners = await _listen(None, 0)
    ports = {listener.socket.getsockname()[1] for listener in listeners}
    for listener in listeners:
        await listener.aclose()
    assert len(ports) == 1


@pytest.mark.parametrize("host", ["a..b", "..", "x" * 64 + ".example"])
async def test_a_name_that_no_host_can_have_is_not_reached(host: str) -> None:
    """Announcements carry what their author likes; Python refuses these with an error that is no OSError."""
    with pytest.raises(LinkLost, match="no host can have that name"):
        await connect(f"{host}:8420")


async def test_who_is_not_admitted_hears_why_and_others_get_in(mesh: TestMesh) -> None:
    holder, barred, other = mesh.node(), mesh.node(), mesh.node()

    def admit(peer: PeerIdentity) -> None:
        assert peer.issuer == node_id_of(key_bytes(mesh.issuer.certificate))
        if peer.node_id == barred.node_id:
            raise Barred("revoked from the mesh")

    async def member(stream: Stream) -> None:
        await stream.send_frame(b"in")

    async with trio.open_nursery() as nursery:
        transport = Transport(holder)
        transport.admit = admit
        port = await nursery.start(transport.serve, "127.0.0.1", 0, Handlers(member))
        address = f"127.0.0.1:{port}"
        with pytest.raises(Barred, match="the peer refused: revoked from the mesh"):
            await Transport(barred).dial(holder.node_id, [address], StreamClass.CONTROL)
        stream = await Transport(other).dial(holder.node_id, [address], StreamClass.CONTROL)
        assert await stream.receive_frame() == b"in"
        assert stream.remote == address
        await stream.aclose()
        nursery.cancel_scope.cancel()
