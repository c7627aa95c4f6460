"""Who may talk to the endpoint: host and origin against DNS rebinding, API keys and how much each may ask, web pages.

A page in a browser can reach 127.0.0.1; what it cannot do is choose its Host header's meaning or hide its Origin.
Invariants: keys and tokens are compared in constant time and appear in no answer; a key's place is given back exactly
once, however its request ends.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meshnode.io.http.answer import json_response
from meshnode.io.http.failure import RETRY_OVERLOADED_S, Failure, Refused, dialect_of
from meshnode.io.http.owners import owned, owner_name

LOOPBACK_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "::1"})
PREFLIGHT_S: Final = 600
"""A browser remembers a preflight's answer this long: settings change with a restart."""
ASKED_HEADERS: Final = 1024
"""Characters of the header names that a page asks to send; the SDKs send a dozen of their own."""

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
    requests_per_key: int = 0
    """At the same time; 0: no limit."""
    origins: frozenset[str] = frozenset()
    """Further pages, `scheme://host[:port]` in lower case, that may ask and read; `*` for all."""

    def invites(self, origin: str) -> bool:
        """Whether a page of `origin` may read what is answered."""
        return "*" in self.origins or origin.lower() in self.origins or _host_of(origin) in self.hosts


class Gate:
    """`app` behind `access`. `refused` counts, by reason, who was not let in."""

    def __init__(self, app: ASGIApp, access: Access, refused: Counter[str]) -> None:
        self._app = app
        self._access = access
        self._refused = refused
        self._keys = [_digest(key) for key in access.keys]
        secret = secrets.token_bytes(32)
        self._owners = {key: owner_name(secret, key) for key in self._keys}
        self._held: Counter[bytes] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI app."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin", "")
        if origin and self._access.invites(origin):
            send = _for_page(origin, send)
        refusal = self._misplaced(headers)
        if refusal is None and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await _preflight(headers)(scope, receive, send)
            return
        if refusal is not None:
            await refusal.response(dialect_of(scope["path"]))(scope, receive, send)
            return
        await self._admitted(scope, receive, send, headers)

    def _misplaced(self, headers: Headers) -> Failure | None:
        """By Host and Origin."""
        access = self._access
        if not access.any_host and _host_of(f"//{headers.get('host', '')}") not in access.hosts:
            return self._refuse("host", Failure(403, "permission_error", "this Host header is not served here"))
        if "origin" in headers and not access.any_host and not access.invites(headers["origin"]):
            message = "pages of this origin may not use this endpoint; --cors-origins says which may"
            return self._refuse("origin", Failure(403, "permission_error", message))
        return None

    async def _admitted(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        # The admin routes have a token of their own.
        if not self._keys or scope["path"] in _OPEN_PATHS or scope["path"].startswith("/api/"):
            await self._app(scope, receive, send)
            return
        key = self._key(_bearer(headers) or headers.get("x-api-key", ""))
        if key is None:
            refused = self._refuse("key", _unauthorized("a valid API key is needed"))
            await refused.response(dialect_of(scope["path"]))(scope, receive, send)
            return
        most = self._access.requests_per_key
        if most and self._held[key] >= most:
            wait = {"retry-after": str(RETRY_OVERLOADED_S)}
            message = f"this API key has requests under way, as many as it may have at once: {most}"
            full = Failure(429, "rate_limit_error", message, "rate_limit_exceeded", headers=wait)
            await self._refuse("key_limit", full).response(dialect_of(scope["path"]))(scope, receive, send)
            return
        self._held[key] += 1
        try:
            await self._app(owned(scope, self._owners[key]), receive, send)
        finally:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]

    def _key(self, given: str) -> bytes | None:
        """The digest of `given` if it is a key. Every key is compared, and digests have one length, so the time tells
        nothing about which one was near."""
        if not given:
            return None
        digest = _digest(given)
        return digest if sum([hmac.compare_digest(digest, key) for key in self._keys]) else None

    def _refuse(self, reason: str, failure: Failure) -> Failure:
        self._refused[reason] += 1
        return failure


def admin_route(path: str, methods: list[str], token: str, handler: Callable[[Request], Awaitable[Any]]) -> Route:
    """A route of `/api` that needs `Authorization: Bearer <token>`; what `handler` returns goes out as JSON.

    `handler` may raise any MeshError, may return a Response of its own, and None for 204.
    """
    expected = _digest(token)

    async def serve(request: Request) -> Response:
        if not hmac.compare_digest(_digest(_bearer(request.headers)), expected):
            raise Refused(_unauthorized("this route needs the token of the file api-token in the data directory"))
        result = await handler(request)
        if isinstance(result, Response):
            return result
        return Response(status_code=204) if result is None else json_response(result)

    return Route(path, serve, methods=methods)


def _preflight(headers: Headers) -> Response:
    """What a browser asks before it sends a page's request. Without the headers of `_for_page` it means no."""
    asked = headers.get("access-control-request-headers", "")[:ASKED_HEADERS]
    allowed = {
        "access-control-allow-methods": "GET, POST, OPTIONS",
        "access-control-allow-headers": asked or "authorization, content-type, x-api-key",
        "access-control-max-age": str(PREFLIGHT_S),
    }
    if headers.get("access-control-request-private-network") == "true":
        # A page of the wide web, named by a person, asks a machine of this network.
        allowed["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=allowed)


def _for_page(origin: str, send: Send) -> Send:
    """`send` with the headers without which a browser hides an answer from the page."""
    more = [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", b"retry-after, x-should-retry"),
        (b"vary", b"Origin"),
    ]

    async def tell(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await send(message)

    return tell


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _bearer(headers: Headers) -> str:
    kind, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def _unauthorized(message: str) -> Failure:
    return Failure(401, "authentication_error", message, "invalid_api_key", headers={"www-authenticate": "Bearer"})
