"""`/api/revocations`, `/api/issuers` and `/api/ping` of a running node (types in app.admin)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.routing import Route

from meshnode.app.admin import (
    IssuerListing,
    IssuerListings,
    IssuerRequest,
    PingAnswer,
    PingRequest,
    RevokeRequest,
)
from meshnode.app.issuing import Issuing
from meshnode.app.probing import Probing
from meshnode.app.revoking import Revoking
from meshnode.identity.ids import NodeId
from meshnode.io.http.access import admin_route
from meshnode.io.http.body import decode, read_body


class MemberRoutes:
    """What the command line asks about other members."""

    def __init__(self, revoking: Revoking, issuing: Issuing, probing: Probing) -> None:
        self._revoking = revoking
        self._issuing = issuing
        self._probing = probing

    def routes(self, token: str) -> list[Route]:
        """All routes, each behind the token."""
        table: list[tuple[str, str, Callable[[Request], Awaitable[object]]]] = [
            ("POST", "/api/revocations", self.revoke),
            ("GET", "/api/issuers", self.issuers),
            ("POST", "/api/issuers", self.add_issuer),
            ("POST", "/api/issuers/revoke", self.revoke_issuer),
            ("POST", "/api/ping", self.ping),
        ]
        return [admin_route(path, [method], token, handler) for method, path, handler in table]

    async def revoke(self, request: Request) -> None:
        """POST /api/revocations."""
        asked = decode(await read_body(request), RevokeRequest)
        await self._issuing.revoke_issuers_on(NodeId(asked.node))
        await self._revoking.revoke(NodeId(asked.node))

    async def issuers(self, request: Request) -> IssuerListings:
        """GET /api/issuers."""
        return IssuerListings(self._issuing.listings())

    async def add_issuer(self, request: Request) -> IssuerListing:
        """POST /api/issuers."""
        return await self._issuing.add(NodeId(decode(await read_body(request), IssuerRequest).id))

    async def revoke_issuer(self, request: Request) -> None:
        """POST /api/issuers/revoke."""
        await self._issuing.revoke(NodeId(decode(await read_body(request), IssuerRequest).id))

    async def ping(self, request: Request) -> PingAnswer:
        """POST /api/ping."""
        asked = decode(await read_body(request), PingRequest)
        return await self._probing.ping(NodeId(asked.node))
