"""`/api/revocations` and `/api/ping` of a running node (types in app.admin)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.routing import Route

from meshnode.app.admin import PingAnswer, PingRequest, RevokeRequest
from meshnode.app.probing import Probing
from meshnode.app.revoking import Revoking
from meshnode.identity.ids import NodeId
from meshnode.io.http.access import admin_route
from meshnode.io.http.body import decode, read_body


class MemberRoutes:
    """What the command line asks about other members."""

    def __init__(self, revoking: Revoking, probing: Probing) -> None:
        self._revoking = revoking
        self._probing = probing

    def routes(self, token: str) -> list[Route]:
        """All routes, each behind the token."""
        table: list[tuple[str, Callable[[Request], Awaitable[object]]]] = [
            ("/api/revocations", self.revoke),
            ("/api/ping", self.ping),
        ]
        return [admin_route(path, ["POST"], token, handler) for path, handler in table]

    async def revoke(self, request: Request) -> None:
        """POST /api/revocations."""
        asked = decode(await read_body(request), RevokeRequest)
        await self._revoking.revoke(NodeId(asked.node))

    async def ping(self, request: Request) -> PingAnswer:
        """POST /api/ping."""
        asked = decode(await read_body(request), PingRequest)
        return await self._probing.ping(NodeId(asked.node))
