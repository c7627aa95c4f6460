"""The Python side of actor.py: reads asks, writes what was seen. Standard library only."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any


def serve(deeds: Mapping[str, Callable[[dict[str, Any]], Any]]) -> None:
    """Until the input ends. Clients that print get stderr, so that answers stay alone on stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"saw": deeds[asked["do"]](asked["ask"])}
        except Exception as error:
            answer = {"error": described(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def described(error: BaseException) -> dict[str, Any]:
    """The classes by which a user would catch it, with what SDKs put on it."""
    code = getattr(error, "code", None)
    status = getattr(error, "status_code", None)
    return {
        "kinds": [kind.__name__ for kind in type(error).__mro__],
        "status": status if isinstance(status, int) else None,
        "code": code if isinstance(code, str | int) else None,
        "message": str(error),
    }
