"""Commands about members: status, peers, ping, revoke. What is shown comes from the node's frozen snapshot."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console, RenderableType
from rich.live import Live

from meshnode.app.cli.control import Control
from meshnode.app.cli.inquiries import control, write_json
from meshnode.app.cli.tables import SHORT_ID, members_table, ping_view, status_view
from meshnode.core.node.status import NodeStatus, PeerStatus
from meshnode.errors import ConfigError
from meshnode.identity.ids import is_id

LOOK_S = 1.0
"""Between two looks of --watch: pings come once a second, and a look costs the node 3 ms."""
SHORTEST = 4
"""Characters of an id that may stand for it: shorter ones are more likely somebody's name."""


class Peers(msgspec.Struct, frozen=True):
    """`meshnode peers --json`."""

    peers: tuple[PeerStatus, ...]


class Shown(NamedTuple):
    """A part of the snapshot, for programs and for people."""

    data: Callable[[NodeStatus], msgspec.Struct]
    view: Callable[[NodeStatus], RenderableType]


_STATUS = Shown(lambda now: now, status_view)
_PEERS = Shown(lambda now: Peers(now.peers), members_table)


def status(data: Path | None, as_json: bool, watch: bool) -> int:
    """Show the node."""
    return _show(data, _STATUS, as_json, watch)


def peers(data: Path | None, as_json: bool, watch: bool) -> int:
    """Show the other members."""
    return _show(data, _PEERS, as_json, watch)


def ping(wanted: str, data: Path | None, as_json: bool) -> int:
    """Measure the way to one."""
    with control(data) as node:
        answer = node.ping(find(wanted, node.status()).node)
    if as_json:
        write_json(answer)
    else:
        Console(highlight=False).print(ping_view(answer))
    return 0


def revoke(wanted: str, sure: bool, data: Path | None) -> int:
    """Bar one from the mesh, after a yes."""
    with control(data) as node:
        peer = find(wanted, node.status(), strangers=True)
        called = f"{peer.name} ({peer.node[:SHORT_ID]})"
        if not sure and not confirmed(f"Revoke {called}? It cannot come back with this key."):
            sys.stderr.write("nothing was changed\n")
            return 1
        node.revoke(peer.node)
    sys.stdout.write(f"{called} is revoked\n")
    return 0


def find(wanted: str, now: NodeStatus, *, strangers: bool = False) -> PeerStatus:
    """The one peer with this name, id, or beginning of an id. ConfigError for none and for several.

    With `strangers` a whole id that this node does not know (any more) counts too.
    """
    exact = [peer for peer in now.peers if wanted in {peer.node, peer.name}]
    begins = [peer for peer in now.peers if len(wanted) >= SHORTEST and peer.node.startswith(wanted.lower())]
    found = {peer.node: peer for peer in [*exact, *begins]}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        ids = ", ".join(node[: 2 * SHORT_ID] for node in found)
        raise ConfigError(f"{wanted!r} is {len(found)} members: {ids}", "Name one by its id.")
    if strangers and is_id(wanted):
        return PeerStatus(wanted, wanted[:SHORT_ID], "")
    raise ConfigError(f"{wanted!r} is no other member that this node knows", "`meshnode peers` lists them")


def confirmed(question: str) -> bool:
    """What a person answers. Nobody there to answer is a no."""
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _show(data: Path | None, shown: Shown, as_json: bool, watch: bool) -> int:
    with control(data) as node:
        if watch and as_json:
            _write_changes(node, shown)
        elif watch:
            _draw(node, shown)
        elif as_json:
            write_json(shown.data(node.status()))
        else:
            Console(highlight=False).print(shown.view(node.status()))
    return 0


def _write_changes(node: Control, shown: Shown) -> None:
    """One line of JSON for every snapshot in which more than ages and pings differ, until Ctrl-C."""
    told: NodeStatus | None = None
    while True:
        now = node.status()
        if told is None or shown.data(steady(now)) != shown.data(told):
            told = steady(now)
            sys.stdout.write(msgspec.json.encode(shown.data(now)).decode() + "\n")
            sys.stdout.flush()
        _pause()


def steady(status: NodeStatus) -> NodeStatus:
    """The snapshot without what moves all the time: ages, round trips, counters."""
    peers = tuple(msgspec.structs.replace(peer, age_s=0.0, rtt_ms=None) for peer in status.peers)
    return msgspec.structs.replace(status, uptime_s=0.0, peers=peers, counters={})


def _draw(node: Control, shown: Shown) -> None:
    """The table, in place, until Ctrl-C."""
    console = Console(highlight=False)
    with Live(shown.view(node.status()), console=console, auto_refresh=False) as live:
        while True:
            _pause()
            live.update(shown.view(node.status()), refresh=True)


def _pause() -> None:
    threading.Event().wait(LOOK_S)
