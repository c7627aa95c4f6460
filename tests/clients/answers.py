"""An answer over HTTP, reduced to what two servers with the same model have to agree on."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field, fields
from typing import Any

import httpx

ANSWER_S = 60


@dataclass(frozen=True)
class Seen:
    """Each field is one aspect in which servers may differ."""

    status: int
    error: str | None = None
    """Its type; messages are each server's own."""
    choices: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Text and finish_reason by index."""
    usage: tuple[int, int, int] | None = None
    tokens: list[bytes] = field(default_factory=list)
    """As spelled by log-probabilities, of the first choice."""
    order: dict[int | None, str] = field(default_factory=dict)
    """Kinds of chunks by index (None: of no choice), the same ones in a row once."""
    end: str | None = None
    """The last event of a stream."""

    def differs(self, other: Seen) -> frozenset[str]:
        """Names of the aspects that are not the same; where one refuses, there is nothing else to compare."""
        if self.status != other.status:
            return frozenset({"status"})
        return frozenset(each.name for each in fields(self) if getattr(self, each.name) != getattr(other, each.name))


def post(url: str, path: str, body: dict[str, Any] | bytes) -> httpx.Response:
    """One request as a plain HTTP client sends it."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{url}{path}", content=content, headers={"content-type": "application/json"}, timeout=ANSWER_S)


def ask(url: str, path: str, body: dict[str, Any] | bytes) -> Seen:
    answer = post(url, path, body)
    if answer.status_code != 200:
        return Seen(answer.status_code, answer.json()["error"]["type"])
    if answer.headers["content-type"].startswith("text/event-stream"):
        return streamed([line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")])
    return whole(answer.json())


def whole(answer: dict[str, Any]) -> Seen:
    choices = {
        choice["index"]: (
            choice["message"]["content"] if "message" in choice else choice["text"],
            choice["finish_reason"],
        )
        for choice in answer["choices"]
    }
    return Seen(200, None, choices, counts(answer["usage"]), spelled(answer["choices"][0]))


def streamed(events: list[str]) -> Seen:
    chunks = [chunk for event in events[:-1] if (chunk := json.loads(event)) is not None]
    texts: dict[int, str] = {}
    finishes: dict[int, str] = {}
    kinds: dict[int | None, list[str]] = {}
    tokens: list[bytes] = []
    for chunk in chunks:
        if not chunk["choices"]:
            kinds.setdefault(None, []).append("usage" if chunk.get("usage") else "nothing")
        for choice in chunk["choices"]:
            index, said = choice["index"], choice.get("delta", choice)
            text = said.get("content") or said.get("text") or ""
            texts[index] = texts.get(index, "") + text
            kind = "finish" if choice["finish_reason"] else "text" if text else "role" if "role" in said else "empty"
            kinds.setdefault(index, []).append(f"{kind} with text" if kind == "finish" and text else kind)
            if choice["finish_reason"]:
                finishes[index] = choice["finish_reason"]
            if index == 0:
                tokens += spelled(choice)
    usage = next((chunk["usage"] for chunk in chunks if not chunk["choices"] and chunk.get("usage")), None)
    order = {index: " ".join(kind for kind, _ in itertools.groupby(each)) for index, each in kinds.items()}
    choices = {index: (texts[index], finishes[index]) for index in texts}
    return Seen(200, None, choices, counts(usage) if usage else None, tokens, order, events[-1])


def counts(usage: dict[str, Any]) -> tuple[int, int, int]:
    return usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]


def spelled(choice: dict[str, Any]) -> list[bytes]:
    """OpenAI's shape of a chat; the legacy one, which llama-server does not have; or none."""
    found = choice.get("logprobs") or {}
    if "tokens" in found:
        return [token.encode() for token in found["tokens"]]
    return [bytes(each["bytes"]) for each in found.get("content") or ()]
