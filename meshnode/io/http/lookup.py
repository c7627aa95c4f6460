"""Finds the model that a request names: answers here, or passes the request on to the node of its head.

Invariant: a route about one model works on every node of the mesh, and whatever a client sent besides body, content
type and the model's name stays on the node it was sent to: no key and no cookie crosses to another one, only the name
that this node made for the key.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final
from urllib.parse import urlencode

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from meshnode.errors import InvalidRequest, Unavailable
from meshnode.io.http.answer import Draining
from meshnode.io.http.backend import Directory, PassedRequest, ServedModel
from meshnode.io.http.body import decode, read_body
from meshnode.io.http.failure import model_not_found
from meshnode.io.http.owners import OWNER_HEADER, owner_of
from meshnode.io.http.passing import PassedOn, was_passed_on

PASSED_HEADERS: Final = ("content-type", "accept")
"""All that the other node needs; keys and cookies stay here."""
PASSED_QUERY: Final = ("fail_on_no_slot",)
"""Switches of routes without a body: what they hold is a sign, 0 or 1."""

Endpoint = Callable[[Request], Awaitable[Response]]


class _Named(msgspec.Struct, frozen=True):
    model: str | None = None


class Lookup:
    """Makes routes of functions that answer for one model served here."""

    def __init__(self, directory: Directory, draining: Draining) -> None:
        self._directory = directory
        self._draining = draining

    def posted(self, handler: Callable[[ServedModel, bytes], Awaitable[Response]]) -> Endpoint:
        """A route with a JSON body that may name the model."""

        async def serve(request: Request) -> Response:
            body = await read_body(request)
            model = self._find(decode(body, _Named).model, was_passed_on(request.scope))
            if isinstance(model, str):
                return self._pass_on(model, request, request.url.path, body)
            return await handler(model, body)

        return serve

    def got(self, handler: Callable[[ServedModel, Mapping[str, str]], Awaitable[Response]]) -> Endpoint:
        """A route without a body; `?model=` may name the model."""

        async def serve(request: Request) -> Response:
            query = {name: request.query_params[name][:1] for name in PASSED_QUERY if name in request.query_params}
            model = self._find(request.query_params.get("model"), was_passed_on(request.scope))
            if isinstance(model, str):
                path = f"{request.url.path}?{urlencode({**query, 'model': model})}"
                return self._pass_on(model, request, path, b"")
            return await handler(model, query)

        return serve

    def _find(self, name: str | None, passed: bool) -> ServedModel | str:
        """The model if it is to be served here, otherwise the id under which to pass the request on."""
        listings = self._directory.models()
        if not name:
            if len(listings) > 1:
                raise InvalidRequest("model is required where several are served", "model")
            name = listings[0].id if listings else ""
        if (local := self._directory.local(name, passed=passed)) is not None:
            return local
        listing = next((each for each in listings if each.id == name), None)
        if listing is None:
            if not listings:
                raise Unavailable("no model is served in this mesh yet")
            raise model_not_found(name)
        if listing.state == "loading":
            raise Unavailable("Loading model")
        if listing.state == "failed":
            raise Unavailable("the model could not be loaded; `meshnode status` says why")
        return name

    def _pass_on(self, model_id: str, request: Request, path: str, body: bytes) -> Response:
        if was_passed_on(request.scope):
            # The sender's view was stale. Sending it further could go round in circles.
            raise Unavailable("the model moved to another node; try again")
        headers = tuple((name, request.headers[name]) for name in PASSED_HEADERS if name in request.headers)
        if owner := owner_of(request.scope):
            headers += ((OWNER_HEADER, owner),)
        passed = PassedRequest(request.method, path, headers, body)
        return PassedOn(self._directory, model_id, passed, self._draining)
