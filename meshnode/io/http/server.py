"""hypercorn's HTTP/1.1 under our own listener: bounded connections, sends that end, a shutdown that ends.

hypercorn 0.18's trio worker shields every send from cancellation, so one client that stops reading makes its
shutdown hang; it also speaks HTTP/2 in clear text, where a client's window can hold an answer back for ever. So the
accept loop is ours and each connection runs its HTTP/1.1 protocol only.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr, wrap_app

from meshnode.errors import ConfigError
from meshnode.io.http.answer import Draining
from meshnode.io.http.endpoint import HttpEndpoint

CONNECTIONS: Final = 512
"""At once: about 100 KiB each; the lanes behind them are 4 to 64."""
SEND_S: Final = 20.0
"""One write to a client that does not read; the socket buffer before it holds a whole usual answer."""
IDLE_S: Final = 30.0
"""Between requests of one connection, and for the head of a request."""
HEAD_BYTES: Final = 32 * 1024
"""Request line and headers."""
BACKLOG: Final = 128
"""A burst waits in the kernel."""

# Shutdown takes 5 s at most (REQUIREMENTS 12): short answers end by themselves, longer ones get a terminal event,
# and whoever does not read it is cut off.
FINISH_S: Final = 1.5
TERMINAL_S: Final = 2.0

_LOG = logging.getLogger("meshnode.http")


class Started(Protocol):
    """trio's task status."""

    def started(self, value: int) -> None:
        """`value` is the bound port."""
        ...


def listen(host: str, port: int) -> socket.socket:
    """A bound, listening socket; port 0 takes a free one. ConfigError says who has the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Without it a restart within a minute finds the port taken by closed connections.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or "not possible"
        hint = "another program, perhaps another node, uses it: choose a free one with --api-port"
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}", hint) from None
    listener.setblocking(False)
    return listener


async def serve_http(
    endpoint: HttpEndpoint,
    listener: socket.socket,
    shutdown: trio.Event,
    task_status: Started | trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `shutdown`, then drain: accept nothing, end streams with a terminal event, return within 5 s."""
    context = WorkerContext(None)
    build = _Connections(endpoint, context)
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            accepted = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
            await accepting.start(_accept, accepted, build.serve, connections)
            task_status.started(listener.getsockname()[1])
            await shutdown.wait()
            accepting.cancel_scope.cancel()
        await context.terminated.set()
        connections.cancel_scope.deadline = trio.current_time() + FINISH_S + TERMINAL_S
        # Idle connections close on `terminated`; this waits only while an answer is being written.
        connections.start_soon(_end_answers, endpoint.draining)


async def _accept(
    listener: trio.SocketListener,
    serve: Callable[[trio.SocketStream], Awaitable[None]],
    connections: trio.Nursery,
    task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
) -> None:
    await trio.serve_listeners(serve, [listener], handler_nursery=connections, task_status=task_status)


async def _end_answers(draining: Draining) -> None:
    """Answers to other nodes are none of our connections, but they are waited for too."""
    with trio.move_on_after(FINISH_S):
        await draining.wait_idle()
    draining.end()


class _Connections:
    """Starts connections and counts them."""

    def __init__(self, endpoint: HttpEndpoint, context: WorkerContext) -> None:
        self._app = wrap_app(endpoint.app, 0, "asgi")
        self._context = context
        self._open = 0
        self._config = Config()
        self._config.errorlog = _LOG
        self._config.accesslog = None
        self._config.keep_alive_timeout = IDLE_S
        self._config.h11_max_incomplete_size = HEAD_BYTES
        self._config.include_server_header = False

    async def serve(self, stream: trio.SocketStream) -> None:
        """One connection until it ends; what a client does to it never reaches another one."""
        if self._open >= CONNECTIONS:
            await trio.aclose_forcefully(stream)
            return
        self._open += 1
        try:
            await _Connection(self._app, self._config, self._context, ConnectionState({}), stream)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError):
            _LOG.debug("a connection broke")
        finally:
            self._open -= 1


class _Http11(H11Protocol):  # type: ignore[misc]  # hypercorn is skipped by mypy
    """Without the ways into HTTP/2 and web sockets: every request is a request."""

    async def _check_protocol(self, event: h11.Request) -> None:
        return

    async def _create_stream(self, request: h11.Request) -> None:
        headers = [(name, value) for name, value in request.headers if name != b"upgrade"]
        plain = h11.Request(
            method=request.method, target=request.target, headers=headers, http_version=request.http_version
        )
        await super()._create_stream(plain)


class _Connection(TCPServer):  # type: ignore[misc]  # hypercorn is skipped by mypy
    """One connection: plain TCP, HTTP/1.1, every write bounded in time and cancellable."""

    _left = False

    async def run(self) -> None:
        try:
            raw = self.stream.socket
            client = parse_socket_addr(raw.family, raw.getpeername())
            server = parse_socket_addr(raw.family, raw.getsockname())
            async with TaskGroup() as task_group:
                self._task_group = task_group
                self.protocol = _Http11(
                    self.app, self.config, self.context, task_group, self.state, False, client, server,
                    self.protocol_send,
                )  # fmt: skip
                await self.protocol.initiate()
                await self.idle_task.restart(task_group, self._idle_timeout)
                await self._read_data()
                # The client left. hypercorn's idle timer would hold the socket until it is over: a client that does not
                # keep connections (most scripts) would fill CONNECTIONS with 17 requests a second.
                self._left = True
                await self.idle_task.stop()
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self.stream)

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated) and self._left:
            return
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        async with self.send_lock:
            broken = False
            with trio.move_on_after(SEND_S) as patience:
                try:
                    await self.stream.send_all(event.data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    broken = True
        if broken or patience.cancelled_caught:
            await self.protocol.handle(Closed())
            await trio.aclose_forcefully(self.stream)
