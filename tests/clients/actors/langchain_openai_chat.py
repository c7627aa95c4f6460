"""langchain-openai: ChatOpenAI and OpenAI, as chains use them."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import langchain_openai
from protocol import serve

WHERE = {"base_url": os.environ["BASE_URL"], "api_key": os.environ["API_KEY"], "timeout": 60, "max_retries": 0}


def model_of(ask: dict[str, Any], **more: Any) -> tuple[Any, list[tuple[str, str]]]:
    """LangChain puts the settings on the model and the messages into the call."""
    ask = dict(ask)
    messages = [(turn["role"], turn["content"]) for turn in ask.pop("messages")]
    return langchain_openai.ChatOpenAI(**WHERE, **ask, **more), messages


def tokens(metadata: dict[str, Any]) -> list[dict[str, Any]] | None:
    logprobs = metadata.get("logprobs")
    if not logprobs or not logprobs.get("content"):
        return None
    return [
        {
            "token": each["token"],
            "logprob": each["logprob"],
            "bytes": each["bytes"],
            "top": [{"token": top["token"], "logprob": top["logprob"]} for top in each["top_logprobs"]],
        }
        for each in logprobs["content"]
    ]


def counts(usage: Any) -> dict[str, Any] | None:
    if usage is None:
        return None
    return {"prompt": usage["input_tokens"], "completion": usage["output_tokens"], "total": usage["total_tokens"]}


def version(ask: dict[str, Any]) -> Any:
    from importlib.metadata import version as installed

    return installed("langchain-openai")


def chat(ask: dict[str, Any]) -> Any:
    model, messages = model_of(ask)
    answer = model.invoke(messages)
    metadata = answer.response_metadata
    choice = {
        "index": 0,
        "role": "assistant" if answer.type == "ai" else answer.type,
        "text": answer.content,
        "finish": metadata["finish_reason"],
        "logprobs": tokens(metadata),
    }
    return {
        "id": answer.id,
        "model": metadata["model_name"],
        "choices": [choice],
        "usage": counts(answer.usage_metadata),
    }


def several(ask: dict[str, Any]) -> Any:
    """`n` choices, which only `generate` shows."""
    from langchain_core.messages import HumanMessage

    model, messages = model_of(ask)
    found = model.generate([[HumanMessage(text) for _, text in messages]])
    return [generation.text for generation in found.generations[0]]


def chat_stream(ask: dict[str, Any]) -> Any:
    ask = dict(ask)
    options = ask.pop("stream_options", {})
    model, messages = model_of(ask, stream_usage=bool(options.get("include_usage")))
    return [
        {
            "id": chunk.id,
            "model": chunk.response_metadata.get("model_name"),
            "choices": [
                {
                    "index": 0,
                    "role": None,
                    "text": chunk.content,
                    "finish": chunk.response_metadata.get("finish_reason"),
                    "logprobs": tokens(chunk.response_metadata),
                }
            ],
            "usage": counts(chunk.usage_metadata),
        }
        for chunk in model.stream(messages)
    ]


def completion(ask: dict[str, Any]) -> Any:
    ask = dict(ask)
    prompt = ask.pop("prompt")
    found = langchain_openai.OpenAI(**WHERE, **ask).generate([prompt])
    generation = found.generations[0][0]
    usage = (found.llm_output or {})["token_usage"]
    return {
        "choices": [{"index": 0, "text": generation.text, "finish": generation.generation_info["finish_reason"]}],
        "usage": {name: usage[f"{name}_tokens"] for name in ("prompt", "completion", "total")},
    }


def completion_stream(ask: dict[str, Any]) -> Any:
    ask = dict(ask)
    prompt = ask.pop("prompt")
    pieces = langchain_openai.OpenAI(**WHERE, **ask).stream(prompt)
    return [{"choices": [{"index": 0, "text": piece, "finish": None}], "usage": None} for piece in pieces]


def structured(ask: dict[str, Any]) -> Any:
    """`with_structured_output`, as chains use it."""
    schema = ask.pop("schema")
    model, messages = model_of(ask)
    return model.with_structured_output(schema, method="json_schema", strict=True).invoke(messages)


def together(ask: dict[str, Any]) -> Any:
    """The asynchronous calls, all at once, half of them streamed."""

    async def one(number: int, each: dict[str, Any]) -> str:
        model, messages = model_of(each)
        if number % 2:
            return "".join([chunk.content async for chunk in model.astream(messages)])
        return (await model.ainvoke(messages)).content

    async def every() -> list[str]:
        return await asyncio.gather(*(one(number, each) for number, each in enumerate(ask["asks"])))

    return asyncio.run(every())


def chain(ask: dict[str, Any]) -> Any:
    """A prompt, the model and a parser, run over a list."""
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate

    model = langchain_openai.ChatOpenAI(**WHERE, model=ask["model"], temperature=0)
    line = ChatPromptTemplate.from_messages([("user", "{question}")]) | model | StrOutputParser()
    return line.batch([{"question": question} for question in ask["questions"]])


def leave(ask: dict[str, Any]) -> Any:
    """Reads one text chunk and goes away."""
    ask = dict(ask)
    model, messages = model_of({**ask, "extra_body": ask.pop("extra_body", {})})
    stream = model.stream(messages)
    try:
        return next(chunk.content for chunk in stream if chunk.content)
    finally:
        stream.close()


if __name__ == "__main__":
    deeds = (version, chat, several, chat_stream, completion, completion_stream, structured, together, chain, leave)
    serve({deed.__name__: deed for deed in deeds})
