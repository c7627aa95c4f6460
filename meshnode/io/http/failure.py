"""Errors as clients see them: one table from the error tree to status, type and code (design: SERVING).

Invariant: a client never sees a traceback, and nothing in an error repeats the prompt or a key.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final

import msgspec
from starlette.responses import Response

from meshnode.errors import (
    CapacityError,
    ConfigError,
    InvalidRequest,
    LinkLost,
    MeshError,
    Overloaded,
    PromptTooLong,
    RequestError,
    StageLost,
    TimedOut,
    Unavailable,
)

RETRY_OVERLOADED_S: Final = 1
"""A lane frees within a generation; clients back off further by themselves."""
RETRY_UNAVAILABLE_S: Final = 3
"""Loading takes seconds to minutes; the SDKs retry twice with this pause."""


class Dialect(Enum):
    """Whose words a route speaks."""

    CHAT = "OpenAI's chat and completions, and everything else"
    RESPONSES = "OpenAI's responses"
    MESSAGES = "Anthropic's messages"


def dialect_of(path: str) -> Dialect:
    """By the path, for errors before a route was reached."""
    route = path.removeprefix("/v1")
    if route in ("/messages", "/messages/count_tokens"):
        return Dialect.MESSAGES
    return Dialect.RESPONSES if route == "/responses" else Dialect.CHAT


_ANTHROPIC: Final = {
    "exceed_context_size_error": "invalid_request_error",
    "server_error": "api_error",
    "unavailable_error": "overloaded_error",
}
"""Types of errors that Anthropic's clients know by another name."""


class Failure(msgspec.Struct, frozen=True):
    """One error as it goes out. `extra` joins the error object, `headers` the response."""

    status: int
    type: str
    message: str
    code: str | int | None = None
    param: str | None = None
    extra: dict[str, int | str] = {}
    headers: dict[str, str] = {}

    def body(self, dialect: Dialect = Dialect.CHAT) -> dict[str, Any]:
        """The OpenAI envelope, or Anthropic's around the same."""
        kind = _ANTHROPIC.get(self.type, self.type) if dialect is Dialect.MESSAGES else self.type
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code, **self.extra}
        return {"type": "error", "error": error} if dialect is Dialect.MESSAGES else {"error": error}

    def event(self, dialect: Dialect) -> dict[str, Any]:
        """In a stream that has begun."""
        body = self.body(dialect)
        if dialect is Dialect.RESPONSES:
            return {"type": "error", "code": self.code, "message": self.message, "param": self.param, **body}
        return body

    def response(self, dialect: Dialect = Dialect.CHAT) -> Response:
        """The whole answer, for errors before a stream began."""
        body = msgspec.json.encode(self.body(dialect))
        return Response(body, self.status, headers=self.headers, media_type="application/json")


class Refused(RequestError):
    """The HTTP layer itself says no: path, method, size, content type, host, key."""

    kind = "refused"

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def model_not_found(model_id: str) -> Refused:
    """Nobody in the mesh serves `model_id`."""
    message = f"the model `{model_id[:128]}` is not served in this mesh; GET /v1/models lists what is"
    return Refused(Failure(404, "not_found_error", message, "model_not_found", "model"))


def failure_of(error: MeshError) -> Failure:
    """The row of the table for `error`."""
    match error:
        case Refused():
            return error.failure
        case InvalidRequest():
            return Failure(400, "invalid_request_error", str(error), None, error.param)
        case PromptTooLong():
            sizes: dict[str, int | str] = {"n_prompt_tokens": error.prompt_tokens, "n_ctx": error.context_tokens}
            return Failure(400, "exceed_context_size_error", str(error), "context_length_exceeded", extra=sizes)
        case Overloaded():
            wait = {"retry-after": str(RETRY_OVERLOADED_S)}
            return Failure(429, "rate_limit_error", str(error), "rate_limit_exceeded", headers=wait)
        case Unavailable() | StageLost() | LinkLost():
            wait = {"retry-after": str(RETRY_UNAVAILABLE_S)}
            return Failure(503, "unavailable_error", str(error), 503, headers=wait)
        case TimedOut():
            return Failure(504, "timeout_error", str(error))
        case ConfigError():
            hint: dict[str, int | str] = {"hint": error.hint} if error.hint else {}
            return Failure(400, "invalid_request_error", str(error), error.kind, extra=hint)
        case CapacityError():
            return Failure(409, "invalid_request_error", str(error), error.kind)
        case _:
            # What failed once in native code or by our own fault fails again: the SDKs need not try twice more.
            return Failure(500, "server_error", str(error), error.kind, headers={"x-should-retry": "false"})
