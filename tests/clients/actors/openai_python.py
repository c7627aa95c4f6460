"""openai-python, any major: the same script under the interpreter of each."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import openai
from openai_objects import counts, tokens
from protocol import serve

WHERE = {"base_url": os.environ["BASE_URL"], "api_key": os.environ["API_KEY"], "timeout": 60}
client = openai.OpenAI(**WHERE)


def version(ask: dict[str, Any]) -> Any:
    return openai.__version__


def models(ask: dict[str, Any]) -> Any:
    return [model.id for model in client.models.list()]


def model(ask: dict[str, Any]) -> Any:
    return client.models.retrieve(ask["id"]).id


def chat(ask: dict[str, Any]) -> Any:
    return spoken(client.chat.completions.create(**ask))


def spoken(answer: Any) -> dict[str, Any]:
    choices = [
        {
            "index": choice.index,
            "role": choice.message.role,
            "text": choice.message.content,
            "finish": choice.finish_reason,
            "logprobs": tokens(choice.logprobs),
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
                    "logprobs": tokens(choice.logprobs),
                }
                for choice in chunk.choices
            ],
            "usage": counts(chunk.usage),
        }
        for chunk in client.chat.completions.create(**ask, stream=True)
    ]


def legacy(choice: Any) -> dict[str, Any]:
    return {
        "index": choice.index,
        "text": choice.text,
        "finish": choice.finish_reason,
        "logprobs": choice.logprobs.model_dump() if choice.logprobs else None,
    }


def completion(ask: dict[str, Any]) -> Any:
    answer = client.completions.create(**ask)
    return {"choices": [legacy(choice) for choice in answer.choices], "usage": counts(answer.usage)}


def completion_stream(ask: dict[str, Any]) -> Any:
    return [
        {"choices": [legacy(choice) for choice in chunk.choices], "usage": counts(chunk.usage)}
        for chunk in client.completions.create(**ask, stream=True)
    ]


def chat_helper(ask: dict[str, Any]) -> Any:
    """`.stream()`, which puts the whole answer together by itself and refuses chunks out of order."""
    surface = client.chat.completions if hasattr(client.chat.completions, "stream") else client.beta.chat.completions
    with surface.stream(**ask) as stream:
        kinds = [event.type for event in stream]
        return {"kinds": kinds, "whole": spoken(stream.get_final_completion())}


def response(ask: dict[str, Any]) -> Any:
    """The newer route."""
    answer = client.responses.create(**ask)
    counted = answer.usage
    return {
        "text": answer.output_text,
        "status": answer.status,
        "usage": {"prompt": counted.input_tokens, "completion": counted.output_tokens, "total": counted.total_tokens},
    }


def response_stream(ask: dict[str, Any]) -> Any:
    with client.responses.stream(**ask) as stream:
        events = [{"type": event.type, "text": getattr(event, "delta", None)} for event in stream]
        return {"events": events, "text": stream.get_final_response().output_text}


def structured(ask: dict[str, Any]) -> Any:
    """`.create()` with a strict schema: `.parse()` takes classes, which not every major makes into the same schema."""
    import json

    schema = {"name": "answer", "schema": ask.pop("schema"), "strict": True}
    answer = client.chat.completions.create(**ask, response_format={"type": "json_schema", "json_schema": schema})
    return json.loads(answer.choices[0].message.content)


def together(ask: dict[str, Any]) -> Any:
    """The asynchronous client, all at once, half of them streamed."""

    async def one(asker: Any, number: int, each: dict[str, Any]) -> str:
        if number % 2:
            stream = await asker.chat.completions.create(**each, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        return (await asker.chat.completions.create(**each)).choices[0].message.content

    async def every() -> list[str]:
        async with openai.AsyncOpenAI(**WHERE) as asker:
            return await asyncio.gather(*(one(asker, number, each) for number, each in enumerate(ask["asks"])))

    return asyncio.run(every())


def leave(ask: dict[str, Any]) -> Any:
    """Reads one text chunk and goes away."""
    with client.chat.completions.create(**ask, stream=True) as stream:
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                return chunk.choices[0].delta.content
    return None


def impatient(ask: dict[str, Any]) -> Any:
    """A whole answer that the client does not wait for."""
    hurried = client.with_options(timeout=ask.pop("timeout"), max_retries=0)
    return spoken(hurried.chat.completions.create(**ask))


if __name__ == "__main__":
    deeds = (
        version, models, model, chat, chat_stream, completion, completion_stream, chat_helper, response,
        response_stream, structured, together, leave, impatient,
    )  # fmt: skip
    serve({deed.__name__: deed for deed in deeds})
