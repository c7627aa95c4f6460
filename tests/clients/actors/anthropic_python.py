"""anthropic, which asks for `messages`; its base URL is without `/v1`."""

from __future__ import annotations

import os
from typing import Any

import anthropic
from protocol import serve

client = anthropic.Anthropic(
    base_url=os.environ["BASE_URL"].removesuffix("/v1"), api_key=os.environ["API_KEY"], timeout=60
)


def used(usage: anthropic.types.Usage) -> list[int]:
    """All of the prompt, whether it was computed or came out of a cache, and the answer."""
    return [usage.input_tokens + (usage.cache_read_input_tokens or 0), usage.output_tokens]


def message(ask: dict[str, Any]) -> Any:
    answer = client.messages.create(**ask)
    return {
        "text": "".join(block.text for block in answer.content),
        "stop": answer.stop_reason,
        "at": answer.stop_sequence,
        "usage": used(answer.usage),
    }


def message_stream(ask: dict[str, Any]) -> Any:
    with client.messages.stream(**ask) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_message()
    return {"kinds": kinds, "text": answer.content[0].text, "stop": answer.stop_reason, "usage": used(answer.usage)}


def count(ask: dict[str, Any]) -> Any:
    return client.messages.count_tokens(**ask).input_tokens


def leave(ask: dict[str, Any]) -> Any:
    """Reads one text chunk and goes away."""
    with client.messages.stream(**ask) as stream:
        return next(iter(stream.text_stream))


if __name__ == "__main__":
    serve({deed.__name__: deed for deed in (message, message_stream, count, leave)})
