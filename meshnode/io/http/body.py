"""Request bodies: bounded in bytes and time, JSON only, every type error names its field."""

from __future__ import annotations

import re
from typing import Final, TypeVar

import msgspec
import trio
from starlette.requests import ClientDisconnect, Request

from meshnode.errors import InvalidRequest
from meshnode.io.http.failure import Failure, Refused
from meshnode.wire.limits import REQUEST_BODY

DISCARDED_BYTES: Final = 32 * 1024 * 1024
"""Read and thrown away past the limit so that a client that only writes still gets to see its 413."""
PAUSE_S: Final = 30.0
"""Between two pieces of a body: a phone on a bad network, not a connection held open on purpose."""

_FIELD = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`$")
_MISSING = re.compile(r"missing required field `([^`]*)`")

T = TypeVar("T")


async def read_body(request: Request, limit: int = REQUEST_BODY) -> bytes:
    """The body, at most `limit` bytes. Refused with 413, 415 or 408; ClientDisconnect when the client left."""
    _require_json(request)
    pieces: list[bytes] = []
    size = 0
    while True:
        with trio.move_on_after(PAUSE_S) as patience:
            message = await request.receive()
        if patience.cancelled_caught:
            raise Refused(Failure(408, "timeout_error", "the request body stopped arriving"))
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        size += len(piece)
        if size <= limit:
            pieces.append(piece)
        elif size > limit + DISCARDED_BYTES:
            break
        if not message.get("more_body", False):
            break
    if size > limit:
        too_large = f"the request body is larger than {limit // 2**20} MiB"
        raise Refused(Failure(413, "invalid_request_error", too_large, headers={"connection": "close"}))
    return b"".join(pieces)


def decode(body: bytes, into: type[T]) -> T:
    """`body` as the struct `into`. InvalidRequest names the field of the first wrong type."""
    try:
        return msgspec.json.decode(body, type=into)
    except msgspec.ValidationError as error:
        message = str(error)
        place = _FIELD.search(message)
        missing = _MISSING.search(message)
        names = [found.group(1) for found in (place, missing) if found and found.group(1)]
        field = ".".join(names) or None
        raise InvalidRequest(_FIELD.sub("", message) + (f" in `{field}`" if place and field else ""), field) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest("the request body is not valid JSON") from None


def _require_json(request: Request) -> None:
    """Anything else is refused, which also keeps plain HTML forms of foreign pages out."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        hint = "send the request as JSON with `Content-Type: application/json`"
        raise Refused(Failure(415, "invalid_request_error", hint, headers={"connection": "close"}))
