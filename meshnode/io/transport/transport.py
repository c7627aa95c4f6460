"""Dialing and accepting: one port, the preface decides, TLS decides who it is.

    dialer:   connect, preface, TLS, HELLO ->, <- HELLO, stream
    acceptor: accept, preface, then MEMBER: TLS and HELLO; JOIN: TLS; STAGE: the socket goes on as it is

In TLS 1.3 a client learns that its certificate was refused only by its first read: `dial` waits for the
acceptor's HELLO before it returns.

Invariant: a handler gets a stream only after the peer's certificate, name, role and HELLO were checked; before
that a connection holds one seat of the gate, five seconds and 64 KiB.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import trio

from meshnode.errors import Barred, ConfigError, LinkLost, MeshError, PeerError, first_of
from meshnode.identity.chains import PeerIdentity
from meshnode.identity.credentials import Credentials
from meshnode.identity.ids import NodeId, short
from meshnode.io.transport.addresses import is_lan_host, split_address
from meshnode.io.transport.gate import Gate
from meshnode.io.transport.race import first_success
from meshnode.io.transport.stream import FramedStream, JoinStream, MeteredStream, Stream, broken_is_lost
from meshnode.io.transport.tls import join_server_context, member_context
from meshnode.wire import limits
from meshnode.wire.preface import (
    PREFACE_BYTES,
    Kind,
    Preface,
    Refused,
    StreamClass,
    check_hello,
    decode_hello,
    decode_preface,
    encode_hello,
    encode_preface,
    hello,
)

log = logging.getLogger("meshnode.transport")

TELL_AGAIN_S = 60.0
"""A refusal that repeats is logged once a minute: peers dial again every five seconds."""
TOLD = 64
"""Refusals remembered for that; beyond, new ones are only counted, so that strangers cannot fill a disk."""


@dataclass(frozen=True)
class Handlers:
    """What happens to an accepted connection. `MeshError` of a handler ends its connection and is counted.

    `member(stream)` and `join(stream)`: the stream is closed when they return. `stage(token, socket)`: owns
    the blocking socket, of which nothing behind the preface was read; an unknown token is theirs to close.
    """

    member: Callable[[Stream], Awaitable[None]]
    join: Callable[[JoinStream], Awaitable[None]] | None = None
    stage: Callable[[bytes, socket.socket], Awaitable[None]] | None = None


class Transport:
    """Authenticated streams between the members of one mesh.

    With `lan_only`, nothing outside the local network is ever dialed, whoever announces it, and no name looked up.
    """

    def __init__(self, credentials: Credentials, *, lan_only: bool = False) -> None:
        self._lan_only = lan_only
        self._gate = Gate(limits.HANDSHAKES_AT_ONCE, limits.HANDSHAKES_PER_ADDRESS)
        self._streams = Gate(limits.MEMBER_STREAMS, limits.STREAMS_PER_PEER)
        self._dialing: dict[NodeId, trio.CapacityLimiter] = {}
        self._counts: Counter[str] = Counter()
        self._told: dict[tuple[str, str], float] = {}
        self.admit: Callable[[PeerIdentity], None] = lambda peer: None
        """Raises `Barred` when the node behind a good certificate gets no stream, whoever dialed. It hears the text."""
        self.renew(credentials)

    def renew(self, credentials: Credentials) -> None:
        """Show these certificates on new connections; streams that are open stay open."""
        self._credentials = credentials
        self._client = member_context(server=False, credentials=credentials)
        self._server = member_context(server=True, credentials=credentials)
        self._join = join_server_context(credentials)

    def statistics(self) -> dict[str, int]:
        """Counts since the start, by what happened: `dialed`, `accepted`, `joins`, `stages`, and failures."""
        now = {"handshakes_now": self._gate.taken(), "accepted_streams_now": self._streams.taken()}
        return {**self._counts, **now}

    # --- dialing --------------------------------------------------------------------------------------

    async def dial(self, node_id: NodeId, addresses: Sequence[str], stream_class: StreamClass) -> Stream:
        """A stream to `node_id` and nobody else, over the first of `addresses` that proves to be it.

        At most `limits.DIAL_CANDIDATES`, each for `limits.DIAL_TIMEOUT_S`. `PeerError` when somebody answered
        and was wrong, `LinkLost` when nobody did.
        """
        assert stream_class is not StreamClass.ACTIVATION, "activations go from stage to stage: dial_stage"
        preface = Preface(Kind.MEMBER, stream_class)

        async def attempt(address: str) -> Stream:
            return await self._dial_one(node_id, address, preface)

        try:
            async with self._turn_to_dial(node_id):
                stream = await first_success(addresses, attempt, Stream.aclose, limits.DIAL_TIMEOUT_S)
        except (PeerError, LinkLost) as problem:
            self._counts["dial_failed"] += 1
            text = f"{short(node_id)} cannot be reached ({problem})"
            if isinstance(problem, Barred):
                raise Barred(text, problem.reason) from None
            raise type(problem)(text) from None
        self._counts["dialed"] += 1
        return stream

    @asynccontextmanager
    async def _turn_to_dial(self, node_id: NodeId) -> AsyncIterator[None]:
        """A burst of dials would be more than the peer lets one address begin: wait here instead."""
        limiter = self._dialing.setdefault(node_id, trio.CapacityLimiter(limits.DIALS_PER_PEER))
        try:
            with trio.fail_after(limits.DIAL_TIMEOUT_S):
                await limiter.acquire()
        except trio.TooSlowError:
            raise LinkLost("others dial it and get no answer") from None
        try:
            yield
        finally:
            limiter.release()
            if not limiter.borrowed_tokens:
                self._dialing.pop(node_id, None)

    async def _dial_one(self, node_id: NodeId, address: str, preface: Preface) -> Stream:
        raw = await connect(address, lan_only=self._lan_only)
        metered = MeteredStream(raw, limits.UNAUTHENTICATED_BYTES)
        try:
            with broken_is_lost():
                await raw.send_all(encode_preface(preface))
            tls = trio.SSLStream(metered, self._client)
            await _shake_hands(tls, raw)
            return await self._introduce(FramedStream(tls, limits.HELLO_FRAME), node_id, preface)
        except BaseException:
            await trio.aclose_forcefully(metered)
            raise

    async def _introduce(self, framed: FramedStream, node_id: NodeId, preface: Preface) -> Stream:
        """Check who answered, say HELLO and wait for theirs: only that proves that they took our certificate."""
        peer = framed.peer_identity()
        if peer.node_id != node_id:
            raise PeerError(f"{short(peer.node_id)} answers there")
        try:
            self.admit(peer)
        except Barred as problem:
            await framed.send_frame(encode_hello(Refused(str(problem)[:200], barred=True)))
            await framed.aclose()
            raise PeerError("it was revoked from the mesh") from None  # not by the peer: by this node
        ours = hello(preface, self._credentials.mesh_id, self._credentials.node_id)
        await framed.send_frame(encode_hello(ours))
        check_hello(decode_hello(await framed.receive_frame()), ours, peer.node_id)
        return Stream(framed, peer, preface.stream_class)

    async def dial_stage(self, addresses: Sequence[str], token: bytes) -> socket.socket:
        """A blocking socket to the stage behind `token` (16 bytes), preface written, TLS not begun.

        Over the first address that answers: only there the token is said, which seats one connection. `LinkLost` when
        nobody answers within `limits.DIAL_TIMEOUT_S`.
        """

        async def attempt(address: str) -> trio.SocketStream:
            return await connect(address, lan_only=self._lan_only)

        raw = await first_success(addresses, attempt, trio.aclose_forcefully, limits.DIAL_TIMEOUT_S)
        try:
            with trio.fail_after(limits.DIAL_TIMEOUT_S), broken_is_lost():
                await raw.send_all(encode_preface(Preface(Kind.STAGE, StreamClass.ACTIVATION, token)))
            return _detach(raw)
        except trio.TooSlowError:
            await trio.aclose_forcefully(raw)
            raise LinkLost(f"no answer within {limits.DIAL_TIMEOUT_S:g} s") from None
        except BaseException:
            await trio.aclose_forcefully(raw)
            raise

    # --- accepting ------------------------------------------------------------------------------------

    async def serve(
        self,
        host: str | None,
        port: int,
        handlers: Handlers,
        *,
        task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept until cancelled; `await nursery.start(...)` returns the port (port 0 takes a free one).

        `host` None is every interface. `ConfigError` when the port cannot be had.
        """
        listeners = await _listen(host, port)
        port = listeners[0].socket.getsockname()[1]

        async def accept(raw: trio.SocketStream) -> None:
            await self._accept(raw, handlers)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, accept, listeners)
            task_status.started(port)

    async def _accept(self, raw: trio.SocketStream, handlers: Handlers) -> None:
        try:
            _keep_alive(raw)
            address = str(raw.socket.getpeername()[0])
            await self._accept_from(address, raw, handlers)
        except MeshError as problem:
            self._counts[f"accept_{problem.kind}"] += 1
        except OSError:
            self._counts["accept_lost"] += 1
        finally:
            if raw.socket.fileno() >= 0:
                await trio.aclose_forcefully(raw)

    async def _accept_from(self, address: str, raw: trio.SocketStream, handlers: Handlers) -> None:
        with ExitStack() as held:
            stream = await self._receive_connection(address, raw, handlers, held)
            if stream is None:
                return
            self._counts["accepted"] += 1
            try:
                await handlers.member(stream)
            finally:
                await stream.aclose()

    async def _receive_connection(
        self, address: str, raw: trio.SocketStream, handlers: Handlers, held: ExitStack
    ) -> Stream | None:
        """Everything before authentication, within one seat of the gate; the member's stream, or None."""
        stream: Stream | None = None
        with self._gate.seat(address), trio.move_on_after(limits.PREFACE_TIMEOUT_S) as scope:
            preface = decode_preface(await _receive_exactly(raw, PREFACE_BYTES))
            match preface.kind:
                case Kind.MEMBER:
                    stream = await self._accept_member(address, raw, preface, held)
                case Kind.JOIN if handlers.join is not None:
                    scope.deadline += limits.JOIN_TIMEOUT_S - limits.PREFACE_TIMEOUT_S
                    await self._accept_join(raw, handlers.join, scope)
                case Kind.STAGE if handlers.stage is not None:
                    self._counts["stages"] += 1
                    await handlers.stage(preface.token, _detach(raw))
                case _:
                    raise PeerError("a kind of connection that this node does not serve")
        if scope.cancelled_caught:
            self._counts["accept_timed_out"] += 1
        return stream

    async def _accept_member(self, address: str, raw: trio.SocketStream, preface: Preface, held: ExitStack) -> Stream:
        try:
            framed = await _serve_tls(raw, self._server, limits.HELLO_FRAME)
            peer = framed.peer_identity()
        except PeerError as problem:
            self._tell(address, str(problem))
            raise
        ours = hello(preface, self._credentials.mesh_id, self._credentials.node_id)
        theirs = decode_hello(await framed.receive_frame())
        try:
            check_hello(theirs, ours, peer.node_id)
            self.admit(peer)
            held.enter_context(self._streams.seat(peer.node_id))
        except PeerError as problem:
            self._tell(f"{short(peer.node_id)} at {address}", str(problem))
            await framed.send_frame(encode_hello(Refused(str(problem)[:200], isinstance(problem, Barred))))
            await framed.aclose()
            raise
        await framed.send_frame(encode_hello(ours))
        return Stream(framed, peer, preface.stream_class)

    def _tell(self, who: str, problem: str) -> None:
        """Log why a member's connection came to nothing: the other end is often a machine away."""
        now = trio.current_time()
        self._told = {key: at for key, at in self._told.items() if at > now - TELL_AGAIN_S}
        if (who, problem) not in self._told and len(self._told) < TOLD:
            self._told[who, problem] = now
            log.warning("a connection of %s is refused: %s", who, problem)

    async def _accept_join(
        self, raw: trio.SocketStream, handler: Callable[[JoinStream], Awaitable[None]], scope: trio.CancelScope
    ) -> None:
        address = str(raw.socket.getpeername()[0])
        framed = await _serve_tls(raw, self._join, limits.JOIN_FRAME)
        self._counts["joins"] += 1
        try:
            await handler(JoinStream(framed, address, scope))
        finally:
            await framed.aclose()


async def _listen(host: str | None, port: int) -> list[trio.SocketListener]:
    """One listener per address family, all on one port, also when that is any free one (0)."""
    for last_try in (False, False, False, False, True):
        try:
            listeners = await trio.open_tcp_listeners(port, host=host, backlog=limits.LISTEN_BACKLOG)
            if port or len(listeners) == 1:
                return listeners
            # Each family got a port of its own: take the first's for all, unless another process is quicker.
            free = listeners[0].socket.getsockname()[1]
            for listener in listeners:
                await listener.aclose()
            return await trio.open_tcp_listeners(free, host=host, backlog=limits.LISTEN_BACKLOG)
        except OSError as problem:
            if port or last_try:
                raise ConfigError(
                    f"cannot listen on port {port}: {problem.strerror or problem}",
                    "Is another node running? Choose another port with --port.",
                ) from None
    raise AssertionError("the last try returns or raises")


async def connect(address: str, *, lan_only: bool = False) -> trio.SocketStream:
    """A TCP connection with TCP_NODELAY and keep-alive; `LinkLost` when there is none to be had."""
    host, port = split_address(address)
    if lan_only and not is_lan_host(host):  # a name neither: asking for it would leave the network already
        raise LinkLost("outside the local network, which this node leaves only with --wan")
    try:
        raw = await trio.open_tcp_stream(host, port)
    except socket.gaierror as problem:
        reason = problem.strerror or "the name is not known"
    except OSError as problem:
        reason = _why(problem)
    except UnicodeError:  # names come from announcements; Python refuses empty and long labels before it looks them up
        reason = "no host can have that name"
    else:
        _keep_alive(raw)
        return raw
    raise LinkLost(reason)


_KEEPALIVE = (
    (("TCP_KEEPIDLE", "TCP_KEEPALIVE"), limits.KEEPALIVE_IDLE_S),  # the second is macOS's name of it
    (("TCP_KEEPINTVL",), limits.KEEPALIVE_INTERVAL_S),
    (("TCP_KEEPCNT",), limits.KEEPALIVE_PROBES),
)


def _keep_alive(raw: trio.SocketStream) -> None:
    """Let the kernel find out whether the other machine is still there; what it cannot be told stays as it is."""
    with suppress(OSError):  # some systems refuse it on a connection that is over already: its first use says so
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for names, value in _KEEPALIVE:
            option = next((getattr(socket, name) for name in names if hasattr(socket, name)), None)
            if option is not None:
                raw.setsockopt(socket.IPPROTO_TCP, option, value)


def _why(problem: OSError) -> str:
    """In the system's words: trio names every attempt of a host, and keeps the reasons in a group behind."""
    behind = problem.__cause__
    first = first_of(behind) if isinstance(behind, BaseExceptionGroup) else behind
    number = first.errno if isinstance(first, OSError) else problem.errno
    if number in (None, errno.ECONNREFUSED):
        return "the connection was refused"
    return os.strerror(number).lower()


async def _serve_tls(raw: trio.SocketStream, context: ssl.SSLContext, frame_limit: int) -> FramedStream:
    tls = trio.SSLStream(MeteredStream(raw, limits.UNAUTHENTICATED_BYTES), context, server_side=True)
    await _shake_hands(tls, raw)
    return FramedStream(tls, frame_limit)


async def _shake_hands(tls: trio.SSLStream[MeteredStream], raw: trio.SocketStream) -> None:
    with broken_is_lost():
        try:
            await tls.do_handshake()
        except trio.BrokenResourceError:
            # trio drops the alert that says why; without it the other end sees nothing but an end.
            alert = tls._outgoing.read()
            if alert:
                with suppress(trio.BrokenResourceError):
                    await raw.send_all(alert)
            raise


async def _receive_exactly(raw: trio.SocketStream, count: int) -> bytes:
    """`count` bytes and not one more: what follows may belong to another process."""
    data = b""
    while len(data) < count:
        part = await raw.socket.recv(count - len(data))
        if not part:
            raise LinkLost("the connection ended within its preface")
        data += part
    return data


def _detach(raw: trio.SocketStream) -> socket.socket:
    """Take the socket away from trio, blocking again."""
    plain = socket.socket(fileno=raw.socket.detach())
    plain.setblocking(True)
    return plain
