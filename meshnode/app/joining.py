"""How a node comes by its membership: what the data directory knows, an invite, or a mesh of its own.

Invariant: what the settings keep from being dialed later is not dialed here either, and no name is looked up for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime

import trio

from meshnode.app.config import Settings
from meshnode.app.intent import Intent, Join, Resume, Serve
from meshnode.app.renewal import require_valid
from meshnode.core.node.events import PeerFound
from meshnode.errors import ConfigError, InviteError, MeshError
from meshnode.identity.ids import short
from meshnode.identity.invites import Invite, check_not_expired, mesh_pin, parse_invite
from meshnode.io.disk.directory import DataDirectory, Membership
from meshnode.io.transport.addresses import is_lan
from meshnode.io.transport.join import redeem

Start = tuple[Membership, list[PeerFound]]
"""The membership to run with, and whom to dial first."""


async def become_member(settings: Settings, data: DataDirectory, intent: Intent, stop: trio.Event) -> Start | None:
    """None when `stop` came first: an issuer may be silent for longer than a person who interrupts wants to wait.

    Giving up is safe at any moment: the same key may redeem the same invite again.
    """
    became: Start | MeshError | None = None

    async def give_up() -> None:
        await stop.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_up)
        try:
            became = await _become_member(settings, data, intent)
        except MeshError as problem:  # raised below, where no group is put around it
            became = problem
        nursery.cancel_scope.cancel()
    if isinstance(became, MeshError):
        raise became
    return became


async def _become_member(settings: Settings, data: DataDirectory, intent: Intent) -> Start:
    now = datetime.now(UTC)
    present = data.membership(now)
    known = [PeerFound(node, addresses) for node, addresses in data.peers().items()]
    if present is not None:
        addresses = [address for peer in known for address in peer.addresses]
        present = await require_valid(data, present, dialable(settings, addresses))
    match intent:
        case Join(invite=text):
            invite = parse_invite(text)
            if present is not None:
                if mesh_pin(present.credentials.mesh_id) != invite.mesh_pin:
                    raise ConfigError(
                        f"{data.path} belongs to mesh {short(present.credentials.mesh_id)}, the invite is for another",
                        "Join the other mesh with a data directory of its own: --data PATH.",
                    )
                return present, known
            check_not_expired(invite, now)
            joined = await redeem(replace(invite, addresses=_issuer_at(settings, invite)), data.node_key(), now)
            membership = data.join_mesh(joined.credentials)
            return membership, [PeerFound(joined.issuer_node, (joined.address,))]
        case Serve():
            return present or data.make_mesh(now), known
        case Resume():
            if present is None:
                raise InviteError(
                    "this machine is not a member of a mesh yet",
                    "Run `meshnode invite` on a machine of the mesh, then `meshnode join <invite>` here.",
                )
            return present, known


def dialable(settings: Settings, addresses: Iterable[str]) -> list[str]:
    """Those of `addresses` that these settings let this node dial."""
    return [address for address in addresses if settings.wan or is_lan(address)]


def _issuer_at(settings: Settings, invite: Invite) -> tuple[str, ...]:
    near = dialable(settings, invite.addresses)
    if not near:
        raise ConfigError(
            f"this invite leads out of the local network, to {', '.join(invite.addresses)}",
            "Add --wan to let this node dial public addresses and look up names.",
        )
    return tuple(near)
