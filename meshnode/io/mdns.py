"""mDNS: hints about who is on this network. Nobody believes them; what they lead to proves itself over TLS.

zeroconf lives in threads of its own and posts into trio. Names, numbers and addresses come from anybody in the network.

Invariant: a `Hint` has a bounded size and well-formed parts, and at most `WAITING` of them wait to be read.
Invariant: nothing is sent but to the multicast group, which routers do not pass on.
"""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio
from zeroconf import (
    DNSQuestionType,
    InterfaceChoice,
    ServiceBrowser,
    ServiceInfo,
    ServiceStateChange,
    Zeroconf,
)
from zeroconf import Error as ZeroconfError

SERVICE = "_meshnode._tcp.local."
PREFIX_CHARACTERS = 16
"""80 bits of an id: nobody meets another's prefix by chance, and TLS checks the whole id."""
MOST_HOSTS = 8
"""As many as a node announces addresses."""
WAITING = 64
"""Hints that were not read yet; more are dropped, mDNS repeats itself."""
_LOOKUP_MS = 1500
"""For the parts of a record that did not come with it."""
_CLOSE_S = 1.0
"""Saying goodbye takes 3 datagrams in 0.4 s; a node that leaves waits no longer than this."""
_TO_ALL = DNSQuestionType.QM
"""Ask for answers by multicast from the first question on. zeroconf's first asks for one to this machine alone, which
goes to whatever else listens on port 5353 here (avahi, another node), and its next comes a second later."""
_PREFIX = re.compile(rf"[a-z2-7]{{{PREFIX_CHARACTERS}}}")


@dataclass(frozen=True)
class Hint:
    """What a node says of itself."""

    mesh: str
    """The first characters of the mesh id."""
    node: str
    """The first characters of the node id."""
    hosts: tuple[str, ...]
    """IP addresses."""
    port: int
    protocol: int
    admits: bool
    """Somebody there may let a machine in without an invite."""


@asynccontextmanager
async def open_mdns(own: Hint | None, interfaces: Sequence[str]) -> AsyncIterator[trio.MemoryReceiveChannel[Hint]]:
    """Announce `own`, if any, and hear of all others (and of it) on `interfaces` (addresses; none: all).

    OSError when this machine cannot do multicast. Gone from the network at the end.
    """
    send, receive = trio.open_memory_channel[Hint](WAITING)
    token = trio.lowlevel.current_trio_token()

    def post(hint: Hint) -> None:
        try:
            send.send_nowait(hint)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    def heard(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            return
        info = zeroconf.get_service_info(service_type, name, _LOOKUP_MS, _TO_ALL)
        hint = None if info is None else parse_hint(info)
        if hint is not None:
            try:
                token.run_sync_soon(post, hint)
            except trio.RunFinishedError:
                pass

    try:
        zeroconf = await trio.to_thread.run_sync(
            partial(_GroupOnly, interfaces=list(interfaces) or InterfaceChoice.All), abandon_on_cancel=False
        )
    except RuntimeError as problem:  # zeroconf's word for a machine without any interface
        raise OSError("no network interface") from problem
    try:
        try:
            await trio.to_thread.run_sync(partial(_begin, zeroconf, own, heard))
        except ZeroconfError as problem:
            raise OSError(f"{type(problem).__name__}") from problem
        with receive:
            yield receive
    finally:
        with trio.move_on_after(_CLOSE_S, shield=True):
            await trio.to_thread.run_sync(zeroconf.close, abandon_on_cancel=True)


class _GroupOnly(Zeroconf):
    """Sends to the multicast group and to nobody else.

    zeroconf answers a question to wherever it says that it came from, also out of this network: who asks forges that.
    """

    def async_send(self, out: Any, addr: str | None = None, *where: Any, **others: Any) -> None:
        """Drop what is addressed to one machine; all our own questions ask for answers to the group."""
        if addr is None:
            super().async_send(out, None, *where, **others)


def _begin(zeroconf: Zeroconf, own: Hint | None, heard: object) -> None:
    handlers = [heard]
    ServiceBrowser(zeroconf, SERVICE, handlers=handlers, question_type=_TO_ALL)  # type: ignore[arg-type]  # by keywords
    if own is not None:
        zeroconf.register_service(service_info(own), cooperating_responders=True)


def service_info(hint: Hint) -> ServiceInfo:
    """The records of `hint`."""
    return ServiceInfo(
        SERVICE,
        f"{hint.node}.{SERVICE}",
        parsed_addresses=list(hint.hosts),
        port=hint.port,
        server=f"meshnode-{hint.node}.local.",
        properties={"m": hint.mesh, "n": hint.node, "v": str(hint.protocol), "a": "1" if hint.admits else "0"},
    )


def parse_hint(info: ServiceInfo) -> Hint | None:
    """The hint in these records; None when anything of it is not as it should be."""
    texts = {key: value or b"" for key, value in info.properties.items()}
    parts = {name: texts.get(name.encode(), b"")[:64].decode("ascii", "replace") for name in "mnva"}
    if not (_PREFIX.fullmatch(parts["m"]) and _PREFIX.fullmatch(parts["n"]) and parts["v"] in _VERSIONS):
        return None
    hosts = tuple(host for host in info.parsed_scoped_addresses()[:MOST_HOSTS] if _is_ip(host))
    port = info.port or 0
    if not hosts or not 0 < port < 2**16:
        return None
    return Hint(parts["m"], parts["n"], hosts, port, int(parts["v"]), parts["a"] == "1")


_VERSIONS = frozenset(map(str, range(1, 100)))


def _is_ip(host: str) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.inet_pton(family, host.partition("%")[0])
    except (OSError, ValueError):
        return False
    return True
