"""Who may talk to the endpoint: host and origin against DNS rebinding, API keys, the admin token.

A page in a browser can reach 127.0.0.1; what it cannot do is choose its Host header's meaning or hide its Origin.
Invariant: keys and tokens are compared in constant time and appear in no answer.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from meshnode.io.http.answer import json_response
from meshnode.io.http.failure import Failure, Refused

LOOPBACK_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "::1"})

_OPEN_PATHS: Final = frozenset({"/health", "/v1/health"})
"""Answered without a key: a supervisor has none."""


class Access(msgspec.Struct, frozen=True):
    """What the endpoint asks of a request."""

    hosts: frozenset[str] = LOOPBACK_HOSTS
    """Host names (without port) under which this node may be asked, and from which pages may ask."""
    any_host: bool = False
    """Where an API key is set, the key is the protection and any name may be used."""
    keys: frozenset[str] = frozenset()
    """Keys of the model API, empty for none."""


def guarded(app: ASGIApp, access: Access) -> ASGIApp:
    """`app` behind `access`."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := _refusal(scope, access)) is not None:
            await refusal.response()(scope, receive, send)
            return
        await app(scope, receive, send)

    return serve


def admin_route(path: str, methods: list[str], token: str, handler: Callable[[Request], Awaitable[Any]]) -> Route:
    """A route of `/api` that needs `Authorization: Bearer <token>`; what `handler` returns goes out as JSON.

    `handler` may raise any MeshError, may return a Response of its own, and None for 204.
    """

    async def serve(request: Request) -> Response:
        if not _matches(_bearer(request.headers), frozenset({token})):
            raise Refused(_unauthorized("this route needs the token of the file api-token in the data directory"))
        result = await handler(request)
        if isinstance(result, Response):
            return result
        return Response(status_code=204) if result is None else json_response(result)

    return Route(path, serve, methods=methods)


def _refusal(scope: Scope, access: Access) -> Failure | None:
    headers = Headers(scope=scope)
    if not access.any_host:
        if _host_of(f"//{headers.get('host', '')}") not in access.hosts:
            return Failure(403, "permission_error", "this Host header is not served here")
        if "origin" in headers and _host_of(headers["origin"]) not in access.hosts:
            return Failure(403, "permission_error", "pages of this origin may not use this endpoint")
    # The admin routes have a token of their own.
    if access.keys and scope["path"] not in _OPEN_PATHS and not scope["path"].startswith("/api/"):
        given = _bearer(headers) or headers.get("x-api-key", "")
        if not _matches(given, access.keys):
            return _unauthorized("a valid API key is needed")
    return None


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _bearer(headers: Headers) -> str:
    kind, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else ""


def _matches(given: str, keys: frozenset[str]) -> bool:
    """Every key is compared, so the time tells nothing about which one was near."""
    raw = given.encode("utf-8", "replace")
    return bool(given) and bool(sum([hmac.compare_digest(raw, key.encode()) for key in keys]))


def _unauthorized(message: str) -> Failure:
    return Failure(401, "authentication_error", message, "invalid_api_key", headers={"www-authenticate": "Bearer"})
