"""Passing an open connection to another process: the one thing of meshnode that only Unix systems can do.

Everywhere else these functions raise ConfigError; the rest of the stage protocol is plain bytes. Windows could hand a
socket over with `socket.share`, which needs nothing here but a third function.
"""

from __future__ import annotations

import os
import socket
from array import array

from meshnode.errors import ConfigError

AT_ONCE = 4
"""Descriptors read with one message: one is sent, the rest is room to notice and close what nobody asked for."""


def available() -> bool:
    """Whether this system can pass descriptors."""
    return hasattr(socket, "SCM_RIGHTS") and hasattr(socket.socket, "sendmsg")


def require() -> None:
    """Raise ConfigError where descriptors cannot be passed."""
    if not available():
        raise ConfigError(
            "this system cannot hand a connection to a stage process",
            hint="run meshnode on Linux or macOS, on Windows inside WSL 2",
        )


def ancillary(descriptor: int) -> list[tuple[int, int, array[int]]]:
    """The control data of a `sendmsg` that carries `descriptor`."""
    require()
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [descriptor]))]


def receive(connection: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """Blocking: up to `size` bytes and the descriptors that came with them, not inheritable. Empty bytes: end."""
    if not available():
        return connection.recv(size), []
    found: list[int] = []
    data, control, flags, _ = connection.recvmsg(size, socket.CMSG_SPACE(AT_ONCE * array("i").itemsize))
    for level, kind, payload in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
            found.extend(numbers)
    for descriptor in found:
        os.set_inheritable(descriptor, False)
    if flags & socket.MSG_CTRUNC:
        close_all(found)
        return data, []
    return data, found


def close_all(descriptors: list[int]) -> None:
    """Close what was received and is not wanted."""
    for descriptor in descriptors:
        os.close(descriptor)
    descriptors.clear()
