"""Bounds what a generated request may cost: without, a missing max_tokens means the whole context, for each choice."""

from __future__ import annotations

from typing import Any

import schemathesis

MAX_TOKENS = 8
MAX_N = 4


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Wrong types stay: only what would be answered at length is cut."""
    if isinstance(body, dict):
        for name, most in (("max_tokens", MAX_TOKENS), ("max_output_tokens", MAX_TOKENS), ("n", MAX_N)):
            asked = body.get(name)
            if name != "n" and (asked is None or asked == -1):
                body[name] = most
            elif isinstance(asked, int) and not isinstance(asked, bool) and asked > most:
                body[name] = most if asked <= 128 else asked
        body.pop("max_completion_tokens", None)
    return body
