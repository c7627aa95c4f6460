"""LiteLLM with the provider `openai/`, as gateways and agents use it."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import litellm
from openai_objects import counts, tokens
from protocol import serve

WHERE = {"api_base": os.environ["BASE_URL"], "api_key": os.environ["API_KEY"], "timeout": 60, "num_retries": 0}


def settings(ask: dict[str, Any], provider: str = "openai") -> dict[str, Any]:
    return {**WHERE, **ask, "model": f"{provider}/{ask['model']}"}


def version(ask: dict[str, Any]) -> Any:
    from importlib.metadata import version as installed

    return installed("litellm")


def chat(ask: dict[str, Any]) -> Any:
    answer = litellm.completion(**settings(ask))
    choices = [
        {
            "index": choice.index,
            "role": choice.message.role,
            "text": choice.message.content,
            "finish": choice.finish_reason,
            "logprobs": tokens(getattr(choice, "logprobs", None)),
        }
        for choice in answer.choices
    ]
    return {"id": answer.id, "model": answer.model, "choices": choices, "usage": counts(answer.usage)}


def chat_stream(ask: dict[str, Any]) -> Any:
    return [
        {
            "id": chunk.id,
            "created": chunk.created,
            "model": chunk.model,
            "choices": [
                {
                    "index": choice.index,
                    "role": choice.delta.role,
                    "text": choice.delta.content,
                    "finish": choice.finish_reason,
                }
                for choice in chunk.choices
            ],
            "usage": counts(getattr(chunk, "usage", None)),
        }
        for chunk in litellm.completion(**settings(ask), stream=True)
    ]


def completion(ask: dict[str, Any]) -> Any:
    answer = litellm.text_completion(**settings(ask, "text-completion-openai"))
    return {
        "choices": [
            {"index": choice.index, "text": choice.text, "finish": choice.finish_reason} for choice in answer.choices
        ],
        "usage": counts(answer.usage),
    }


def completion_stream(ask: dict[str, Any]) -> Any:
    chunks = litellm.text_completion(**settings(ask, "text-completion-openai"), stream=True)
    return [
        {
            "choices": [
                {"index": choice.index, "text": choice.text, "finish": choice.finish_reason} for choice in chunk.choices
            ],
            "usage": None,
        }
        for chunk in chunks
    ]


def models(ask: dict[str, Any]) -> Any:
    """What LiteLLM's gateway asks when it is told to look for models by itself."""
    return litellm.get_valid_models(
        check_provider_endpoint=True,
        custom_llm_provider="openai",
        api_base=WHERE["api_base"].removesuffix("/v1"),
        api_key=WHERE["api_key"],
    )


def together(ask: dict[str, Any]) -> Any:
    """The asynchronous calls, all at once, half of them streamed."""

    async def one(number: int, each: dict[str, Any]) -> str:
        if number % 2:
            stream = await litellm.acompletion(**settings(each), stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return (await litellm.acompletion(**settings(each))).choices[0].message.content

    async def every() -> list[str]:
        return await asyncio.gather(*(one(number, each) for number, each in enumerate(ask["asks"])))

    return asyncio.run(every())


def leave(ask: dict[str, Any]) -> Any:
    """Reads one text chunk and goes away."""
    stream = litellm.completion(**settings(ask), stream=True)
    text = next(chunk.choices[0].delta.content for chunk in stream if chunk.choices[0].delta.content)
    stream.completion_stream.close()
    return text


if __name__ == "__main__":
    deeds = (version, models, chat, chat_stream, completion, completion_stream, together, leave)
    serve({deed.__name__: deed for deed in deeds})
