"""`/api/...` of a running node: what the command line asks it (types in app.admin)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import trio
from starlette.requests import Request
from starlette.routing import Route

from meshnode.app.admin import (
    ApproveRequest,
    InviteIssued,
    InviteListing,
    InviteListings,
    InviteRequest,
    PendingListing,
    PendingListings,
    PlanAnswer,
    PlanRequest,
)
from meshnode.app.planning import answer
from meshnode.core.node.mediator import Mediator
from meshnode.core.node.status import NodeStatus
from meshnode.errors import ConfigError
from meshnode.identity.certificates import Role
from meshnode.identity.invite_book import LONGEST_LIFE
from meshnode.identity.invites import MOST_ADDRESSES, format_invite
from meshnode.io.http.access import admin_route
from meshnode.io.http.body import decode, read_body
from meshnode.io.transport.comparison_desk import ComparisonDesk, PendingJoin
from meshnode.io.transport.join_desk import JoinDesk


class AdminRoutes:
    """The routes of one node. `desk` gives None while this node admits nobody."""

    def __init__(
        self,
        mediator: Mediator,
        desk: Callable[[], JoinDesk | None],
        status: Callable[[], Awaitable[NodeStatus]],
        stop: Callable[[], None],
    ) -> None:
        self._mediator = mediator
        self._desk = desk
        self._status = status
        self._stop = stop

    def routes(self, token: str) -> list[Route]:
        """All routes, each behind the token."""
        table: list[tuple[str, str, Callable[[Request], Awaitable[object]]]] = [
            ("GET", "/api/status", self.status),
            ("POST", "/api/invites", self.invite),
            ("GET", "/api/invites", self.invites),
            ("DELETE", "/api/invites/{id}", self.revoke),
            ("GET", "/api/pending", self.pending),
            ("POST", "/api/pending/approve", self.approve),
            ("POST", "/api/plan", self.plan),
            ("POST", "/api/shutdown", self.shutdown),
        ]
        return [admin_route(path, [method], token, handler) for method, path, handler in table]

    async def status(self, request: Request) -> NodeStatus:
        """GET /api/status."""
        return await self._status()

    async def invite(self, request: Request) -> InviteIssued:
        """POST /api/invites: make one, durable before it is shown."""
        desk = self._require_desk()
        asked = decode(await read_body(request) or b"{}", InviteRequest)
        if asked.role not in tuple(Role):
            raise ConfigError(f"{asked.role!r} is not a role", "member or client")
        addresses = self._mediator.me.addresses[:MOST_ADDRESSES]
        longest = int(LONGEST_LIFE.total_seconds())
        life = timedelta(
            seconds=max(0, min(asked.expires_s, longest + 1))
        )  # refused, where no timedelta holds it either
        invite = await desk.invite(addresses, asked.uses, life, Role(asked.role))
        return InviteIssued(format_invite(invite), invite.invite_id.hex(), invite.expires)

    async def invites(self, request: Request) -> InviteListings:
        """GET /api/invites."""
        now = datetime.now(UTC)
        return InviteListings(
            tuple(
                InviteListing(
                    entry.invite_id.hex(), entry.role, entry.state(now), entry.uses, len(entry.admitted), entry.expires
                )
                for entry in self._require_desk().book.entries
            )
        )

    async def revoke(self, request: Request) -> None:
        """DELETE /api/invites/{id}."""
        try:
            wanted = bytes.fromhex(request.path_params["id"])
        except ValueError:
            raise ConfigError("that is no invite id", "`meshnode invites` lists them") from None
        await self._require_desk().change(lambda book: book.revoke(wanted, datetime.now(UTC)))

    async def pending(self, request: Request) -> PendingListings:
        """GET /api/pending: who asks to join by number."""
        waiting = self._require_comparisons().pending
        return PendingListings(() if waiting is None else (_listing(waiting),))

    async def approve(self, request: Request) -> PendingListing:
        """POST /api/pending/approve: let it in, if the number is right; a wrong one turns it away."""
        asked = decode(await read_body(request), ApproveRequest)
        return _listing(self._require_comparisons().approve(asked.code))

    async def plan(self, request: Request) -> PlanAnswer:
        """POST /api/plan: what this mesh would do, now; nothing is loaded or reserved."""
        asked = decode(await read_body(request), PlanRequest)
        inventory = self._mediator.inventory("", asked.footprint.weight_kind)
        return await trio.to_thread.run_sync(answer, asked, inventory, self._mediator.node)

    async def shutdown(self, request: Request) -> None:
        """POST /api/shutdown: drain and leave."""
        self._stop()

    def _require_comparisons(self) -> ComparisonDesk:
        desk = self._require_desk()
        if desk.comparisons is None:
            raise ConfigError("this node admits nobody without an invite", "It was started with --no-mdns.")
        return desk.comparisons

    def _require_desk(self) -> JoinDesk:
        desk = self._desk()
        if desk is None:
            raise ConfigError(
                "this node cannot invite: it holds no issuer key",
                "Use an issuer (`meshnode issuer list`), or make this node one: `meshnode issuer add` where the mesh "
                "was made.",
            )
        return desk


def _listing(waiting: PendingJoin) -> PendingListing:
    left = max(0.0, waiting.deadline - trio.current_time())
    return PendingListing(waiting.name, waiting.address, waiting.number, left)
