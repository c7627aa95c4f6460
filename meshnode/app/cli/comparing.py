"""Joining without an invite, both ends: a number that two people compare."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import trio

from meshnode.app.admin import ApproveRequest
from meshnode.app.cli.inquiries import control, write_json
from meshnode.app.config import Settings
from meshnode.app.lan import addresses_of, browse
from meshnode.errors import InviteError
from meshnode.identity.comparison import spoken
from meshnode.identity.ids import MeshId, short
from meshnode.io.disk.directory import DataDirectory
from meshnode.io.mdns import Hint
from meshnode.io.transport.comparison import join_by_number

_BY_INVITE = "Run `meshnode invite` on a machine of the mesh, then `meshnode join <invite>` here."


def look_around(settings: Settings) -> None:
    """Make this machine a member by number, unless it is one. `InviteError` when nothing came of it."""
    data = DataDirectory.open(settings.data)
    try:
        if data.membership(datetime.now(UTC)) is None and settings.mdns:
            trio.run(_join, settings, data)
    finally:
        data.close()


async def _join(settings: Settings, data: DataDirectory) -> None:
    sys.stderr.write("looking for a mesh on this network ...\n")
    hint = await _choose(await browse(settings.mdns_interfaces))
    same = partial(_same, hint)
    now = datetime.now(UTC)
    joined = await join_by_number(addresses_of(hint), hint.mesh, settings.name, data.node_key(), now, same)
    data.join_mesh(joined.credentials)
    data.store_peers({joined.issuer_node: (joined.address,)})


async def _choose(found: list[Hint]) -> Hint:
    if not found:
        raise InviteError("no mesh on this network admits machines without an invite", _BY_INVITE)
    for number, hint in enumerate(found, 1):
        sys.stderr.write(f"  {number}  mesh {short(MeshId(hint.mesh))}, at {addresses_of(hint)[0]}\n")
    answer = await _ask(f"which one? [1-{len(found)}, nothing to leave] ")
    if not answer.isascii() or not answer.isdecimal() or not 1 <= int(answer[:4]) <= len(found):
        raise InviteError("no mesh was chosen", _BY_INVITE)
    return found[int(answer[:4]) - 1]


async def _same(hint: Hint, number: str) -> bool:
    sys.stderr.write(
        f"on the machine at {addresses_of(hint)[0]}: `meshnode pending`, then `meshnode approve {number}`\n"
    )
    answer = await _ask(f"does the other machine show {spoken(number)}? [y/N] ")
    return answer.lower() in ("y", "yes")


async def _ask(question: str) -> str:
    sys.stderr.write(question)
    sys.stderr.flush()
    # In a thread, so that the exchange can end while a person thinks; more than a word is no answer.
    answer: str = await trio.to_thread.run_sync(sys.stdin.readline, 64, abandon_on_cancel=True)
    return answer.strip()


def pending(data: Path | None, as_json: bool) -> int:
    """Show who waits."""
    with control(data) as node:
        listed = node.pending()
    if as_json:
        write_json(listed)
        return 0
    for each in listed.pending:
        sys.stdout.write(f"{each.name} at {each.address} shows {spoken(each.number)}? ")
        sys.stdout.write(f"If so, within {each.expires_s:.0f} s: meshnode approve {each.number}\n")
    if not listed.pending:
        sys.stdout.write("nobody asks to join\n")
    return 0


def approve(code: str, data: Path | None) -> int:
    """Let it in."""
    with control(data) as node:
        admitted = node.approve(ApproveRequest(code))
    sys.stdout.write(f"{admitted.name} at {admitted.address} is let in\n")
    return 0
