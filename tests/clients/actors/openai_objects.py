"""What answers of OpenAI's shape say, for the clients that give them as objects. Standard library only."""

from __future__ import annotations

from typing import Any


def tokens(logprobs: Any) -> list[dict[str, Any]] | None:
    """Of a choice, or None where none were given."""
    if not logprobs or logprobs.content is None:
        return None
    return [
        {
            "token": each.token,
            "logprob": each.logprob,
            "bytes": each.bytes,
            "top": [{"token": top.token, "logprob": top.logprob} for top in each.top_logprobs],
        }
        for each in logprobs.content
    ]


def counts(usage: Any) -> dict[str, Any] | None:
    """Of an answer, or None where nothing was counted."""
    if usage is None:
        return None
    return {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens, "total": usage.total_tokens}
