"""The HTTP surface put together: routes with and without `/v1`, errors in one envelope."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, ExceptionHandler

from meshnode import __version__
from meshnode.errors import MeshError
from meshnode.io.http.access import Access, Gate
from meshnode.io.http.answer import Draining, json_response
from meshnode.io.http.backend import Directory, ModelListing
from meshnode.io.http.embeddings import EmbeddingsRoutes
from meshnode.io.http.failure import RETRY_UNAVAILABLE_S, Failure, dialect_of, failure_of, model_not_found
from meshnode.io.http.generation import GenerationRoutes
from meshnode.io.http.inspecting import InspectingRoutes
from meshnode.io.http.lookup import Lookup
from meshnode.io.http.messages import MessagesRoutes
from meshnode.io.http.meter import Meter
from meshnode.io.http.metrics import Figures, MetricsRoutes, all_counters, counted, no_figures
from meshnode.io.http.responses import ResponsesRoutes
from meshnode.io.http.tokens import TokenRoutes


@dataclass(frozen=True)
class HttpEndpoint:
    """What `build_endpoint` made."""

    app: ASGIApp
    """For clients: everything, behind host, origin and key checks."""
    passed: ASGIApp
    """For requests that other nodes passed on (`answer_here`): what is asked of one model, nothing of `/api`."""
    draining: Draining


def build_endpoint(
    directory: Directory,
    admin_routes: Sequence[Route] = (),
    access: Access | None = None,
    figures: Figures = no_figures,
) -> HttpEndpoint:
    """The endpoint of one node. `admin_routes` come from `admin_route`."""
    draining = Draining()
    meter = Meter()
    listing = ListingRoutes(directory, meter)
    measured = MetricsRoutes(directory, meter, figures)
    asking = _asking(Lookup(directory, draining), draining, meter)
    reading = [
        *_both("/models", listing.models, "GET"),
        *_both("/models/{model_id:path}", listing.model, "GET"),
        *_both("/health", listing.health, "GET"),
        *_both("/metrics", measured.metrics, "GET"),
    ]
    whole = Starlette(routes=[*asking, *reading, *admin_routes], exception_handlers=_HANDLERS)
    passed = Starlette(routes=asking, exception_handlers=_HANDLERS)
    return HttpEndpoint(counted(Gate(whole, access or Access(), meter.refused), meter), passed, draining)


def _asking(lookup: Lookup, draining: Draining, meter: Meter) -> list[Route]:
    """Everything that is asked of one model, wherever its head runs."""
    generation, tokens = GenerationRoutes(draining, meter), TokenRoutes()
    responses, messages = ResponsesRoutes(generation), MessagesRoutes(generation)
    inspecting = InspectingRoutes(f"meshnode {__version__}")
    return [
        *_both("/chat/completions", lookup.posted(generation.chat), "POST"),
        *_both("/completions", lookup.posted(generation.completions), "POST"),
        *_both("/embeddings", lookup.posted(EmbeddingsRoutes().embed), "POST"),
        *_both("/responses", lookup.posted(responses.respond), "POST"),
        *_both("/responses/input_tokens", lookup.posted(responses.count), "POST"),
        *_both("/messages", lookup.posted(messages.message), "POST"),
        *_both("/messages/count_tokens", lookup.posted(messages.count), "POST"),
        *_both("/tokenize", lookup.posted(tokens.tokenize), "POST"),
        *_both("/detokenize", lookup.posted(tokens.detokenize), "POST"),
        *_both("/tokenizer_info", lookup.got(tokens.info), "GET"),
        *_both("/props", lookup.got(inspecting.props), "GET"),
        *_both("/slots", lookup.got(inspecting.slots), "GET"),
        *_both("/apply-template", lookup.posted(tokens.apply_template), "POST"),
    ]


class ListingRoutes:
    """models, models/{id} and health."""

    def __init__(self, directory: Directory, meter: Meter) -> None:
        self._directory = directory
        self._meter = meter

    async def models(self, request: Request) -> Response:
        """GET models."""
        return json_response({"object": "list", "data": [_listed(each) for each in self._directory.models()]})

    async def model(self, request: Request) -> Response:
        """GET models/{id}; ids may hold slashes."""
        wanted = request.path_params["model_id"]
        for listing in self._directory.models():
            if listing.id == wanted:
                return json_response(_listed(listing))
        raise model_not_found(wanted)

    async def health(self, request: Request) -> Response:
        """GET health: 200 once a model answers, 503 before; a person can tell loading from having nothing."""
        states = {listing.state for listing in self._directory.models()}
        counters = all_counters(self._directory, self._meter)
        if "ready" in states:
            return json_response({"status": "ok", **counters})
        message = "no model is served"
        if "loading" in states:
            message = "Loading model"
        elif "failed" in states:
            message = "the model could not be loaded; `meshnode status` says why"
        wait = {"retry-after": str(RETRY_UNAVAILABLE_S)}
        failure = Failure(503, "unavailable_error", message, 503, headers=wait)
        response = json_response({**failure.body(), **counters}, failure.status)
        response.headers.update(failure.headers)
        return response


def _listed(listing: ModelListing) -> dict[str, Any]:
    """OpenAI's four keys, and what a person wants to know under `meta` as llama-server does."""
    return {
        "id": listing.id,
        "object": "model",
        "created": listing.created,
        "owned_by": "meshnode",
        "meta": {"n_ctx": listing.context, "state": listing.state, "where": listing.where},
    }


def _both(path: str, endpoint: Any, method: str) -> list[Route]:
    """Some clients are given `/v1` as part of the base URL, some are not."""
    return [Route(f"{prefix}{path}", endpoint, methods=[method]) for prefix in ("/v1", "")]


async def _mesh_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MeshError)
    return failure_of(error).response(dialect_of(request.url.path))


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette's router refuses."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = "no such path; the API lives under /v1"
        return Failure(404, "not_found_error", message, "unknown_url").response()
    headers = dict(error.headers or {})
    message = error.detail
    if error.status_code == 405:
        message = f"this path does not take {request.method}, but {headers.get('Allow', 'another method')}"
    return Failure(error.status_code, "invalid_request_error", message, headers=headers).response(
        dialect_of(request.url.path)
    )


async def _own_bug(request: Request, error: Exception) -> Response:
    """The server logs it; the client learns only that it is not at fault."""
    retry = {"x-should-retry": "false"}
    return Failure(500, "server_error", "internal error of this node; its log says more", headers=retry).response(
        dialect_of(request.url.path)
    )


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads this: the client left while sending its body."""
    return Response(status_code=400)


_HANDLERS: dict[Any, ExceptionHandler] = {
    MeshError: _mesh_error,
    HTTPException: _http_error,
    ClientDisconnect: _gone,
    Exception: _own_bug,
}
