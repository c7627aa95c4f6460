"""The JSON of answers, as OpenAI's clients read it: chat and legacy completions, whole and in chunks.

Invariant: what a stream's deltas add up to equals the whole answer.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Final, Protocol

from meshnode.core.serving.request import Sampled
from meshnode.io.http.backend import ServedModel
from meshnode.io.http.choice import Delta, Spoken
from meshnode.io.http.echo import Echo
from meshnode.io.http.failure import Dialect
from meshnode.io.http.fields import CompletionRequest

Json = dict[str, Any]

PIECE_TOKENS: Final = 256
"""Of a scored prompt in one chunk of a stream: a few milliseconds of writing between two turns of the event loop."""


def usage(prompt_tokens: int, completion_tokens: int, thought_tokens: int, cached_tokens: int) -> Json:
    """Token counts. `cached_tokens` of the prompt were not computed, because a lane held them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": thought_tokens},
    }


def call_id(family: str) -> str:
    """A name for one tool call, by which its result comes back."""
    return f"{family}_{secrets.token_hex(12)}"


class Shape(Protocol):
    """How one route writes its answer."""

    id: str
    dialect: Dialect
    """How its errors are written, and whether `[DONE]` ends its stream."""

    def opening(self, index: int) -> list[Json]:
        """The chunks before a choice's first text."""
        ...

    def chunks(self, delta: Delta) -> Iterable[Json]:
        """The chunks of one delta; a finish comes in a chunk of its own."""
        ...

    def closing(self, counts: Json) -> list[Json]:
        """The chunks after all choices: usage if it was asked for."""
        ...

    def whole(self, choices: Sequence[Sequence[Delta]], counts: Json) -> Json:
        """The answer of a request that does not stream."""
        ...


class _Envelope:
    dialect = Dialect.CHAT

    def __init__(self, prefix: str, kind: str, model: ServedModel) -> None:
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self._kind = kind
        self._model = model.id
        self._fingerprint = model.fingerprint
        self._vocabulary = model.vocabulary
        self._created = int(time.time())

    def _wrap(self, choices: list[Json], kind: str, **more: Any) -> Json:
        head = {"id": self.id, "object": kind, "created": self._created, "model": self._model}
        return {**head, "system_fingerprint": self._fingerprint, "choices": choices, **more}

    def _text_of(self, token: int) -> str:
        """A key for the token: part of a character is spelled as OpenAI does, `bytes:\\xc3`, to stay distinct."""
        written = self._vocabulary.written(token)
        try:
            return written.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{value:02x}" for value in written)


class ChatShape(_Envelope):
    """chat.completion and chat.completion.chunk."""

    def __init__(self, model: ServedModel, with_logprobs: bool, with_usage: bool) -> None:
        super().__init__("chatcmpl", "chat.completion", model)
        self._with_logprobs = with_logprobs
        self._with_usage = with_usage
        self._calls: Counter[int] = Counter()
        self._more: Json = {"usage": None} if with_usage else {}

    def opening(self, index: int) -> list[Json]:
        """The role, which clients expect first and once."""
        return [self._chunk(index, {"role": "assistant", "content": ""}, None, None)]

    def chunks(self, delta: Delta) -> list[Json]:
        """A thought, text with its log-probabilities, then the finish."""
        chunks = []
        if delta.thought:
            chunks.append(self._chunk(delta.index, {"reasoning_content": delta.thought}, None, None))
        if delta.text or (self._with_logprobs and delta.tokens):
            chunks.append(self._chunk(delta.index, {"content": delta.text}, self._logprobs(delta.tokens), None))
        for call in self._called(delta):
            chunks += [self._chunk(delta.index, {"tool_calls": [part]}, None, None) for part in _parts(call)]
        if delta.finish:
            chunks.append(self._chunk(delta.index, {}, None, delta.finish))
        return chunks

    def closing(self, counts: Json) -> list[Json]:
        """No choices, only the counts."""
        return [self._wrap([], "chat.completion.chunk", usage=counts)] if self._with_usage else []

    def whole(self, choices: Sequence[Sequence[Delta]], counts: Json) -> Json:
        """One message per choice."""
        answers = [
            {
                "index": index,
                "message": self._message(deltas),
                "logprobs": self._logprobs([token for delta in deltas for token in delta.tokens]),
                "finish_reason": deltas[-1].finish,
            }
            for index, deltas in enumerate(choices)
        ]
        return self._wrap(answers, "chat.completion", usage=counts)

    def _message(self, deltas: Sequence[Delta]) -> Json:
        text, thought = ("".join(getattr(delta, part) for delta in deltas) for part in ("text", "thought"))
        calls: list[Json] = []
        for call in (call for delta in deltas for call in self._called(delta)):
            if "id" in call:
                calls.append(call)
            else:
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message["content"] = text or None
            message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
        return message

    def _called(self, delta: Delta) -> list[Json]:
        """Its calls, counted by choice; what goes on with the last one has no id."""
        made: list[Json] = []
        for call in delta.calls:
            if call.more:
                made.append({"index": self._calls[delta.index] - 1, "function": {"arguments": call.arguments}})
                continue
            function = {"name": call.name, "arguments": call.arguments}
            number = self._calls[delta.index]
            made.append({"index": number, "id": call_id("call"), "type": "function", "function": function})
            self._calls[delta.index] += 1
        return made

    def _chunk(self, index: int, delta: Json, logprobs: Json | None, finish: str | None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._wrap([choice], "chat.completion.chunk", **self._more)

    def _logprobs(self, tokens: Sequence[Spoken]) -> Json | None:
        if not self._with_logprobs:
            return None
        content = [
            {
                **self._entry(token.sampled.token, token.sampled.logprob),
                "top_logprobs": [self._entry(other.token, other.logprob) for other in token.sampled.alternatives],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> Json:
        written = self._vocabulary.written(token)
        return {"token": written.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(written)}


def _parts(call: Json) -> list[Json]:
    """A call as clients expect it in a stream: its arguments after its name."""
    function = call["function"]
    told = {"index": call["index"], "function": {"arguments": function["arguments"]}}
    if "id" not in call:
        return [told]
    named = {**call, "function": {"name": function["name"], "arguments": ""}}
    return [named, told] if function["arguments"] else [named]


class CompletionShape(_Envelope):
    """text_completion, whole and in chunks, with log-probabilities in the legacy shape."""

    def __init__(self, model: ServedModel, asked: CompletionRequest, echoes: Sequence[Echo]) -> None:
        super().__init__("cmpl", "text_completion", model)
        self._with_usage = asked.with_usage()
        self._with_logprobs = asked.logprobs is not None
        self._echoes = echoes
        """The prompt of each choice; empty without `echo`."""
        self._unscored = set(range(len(echoes))) if asked.scored else set()
        """Choices whose prompt, with its log-probabilities, did not go out yet."""

    def opening(self, index: int) -> list[Json]:
        """The echoed prompt, where it does not have to wait for its log-probabilities."""
        if not self._echoes or index in self._unscored:
            return []
        return [self._chunk(index, self._echoes[index].text, (), None)]

    def chunks(self, delta: Delta) -> Iterator[Json]:
        """The scored prompt, text with its log-probabilities, then the finish."""
        if delta.index in self._unscored:
            self._unscored.discard(delta.index)
            yield from self._scored(delta)
        if delta.text or (self._with_logprobs and delta.tokens):
            yield self._chunk(delta.index, delta.text, self._behind(delta.index, delta.tokens), None)
        if delta.finish:
            yield self._chunk(delta.index, "", (), delta.finish)

    def _scored(self, delta: Delta) -> Iterator[Json]:
        echo = self._echoes[delta.index]
        edges = (*echo.offsets[::PIECE_TOKENS], len(echo.text))
        for number, (start, end) in enumerate(pairwise(edges)):
            tokens = echo.spoken(delta.prompt, number * PIECE_TOKENS, (number + 1) * PIECE_TOKENS)
            yield self._chunk(delta.index, echo.text[start:end], tokens, None)

    def closing(self, counts: Json) -> list[Json]:
        """No choices, only the counts."""
        return [self._wrap([], self._kind, usage=counts)] if self._with_usage else []

    def whole(self, choices: Sequence[Sequence[Delta]], counts: Json) -> Json:
        """One text per choice."""
        answers = []
        for index, deltas in enumerate(choices):
            text = (self._echoes[index].text if self._echoes else "") + "".join(delta.text for delta in deltas)
            tokens = self._echoes[index].spoken(deltas[0].prompt) if index in self._unscored else []
            tokens += self._behind(index, [token for delta in deltas for token in delta.tokens])
            answers.append(self._choice(index, text, tokens, deltas[-1].finish))
        return self._wrap(answers, self._kind, usage=counts)

    def _chunk(self, index: int, text: str, tokens: Sequence[Spoken], finish: str | None) -> Json:
        return self._wrap([self._choice(index, text, tokens, finish)], self._kind)

    def _choice(self, index: int, text: str, tokens: Sequence[Spoken], finish: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[Spoken]) -> Json | None:
        if not self._with_logprobs:
            return None
        return {
            "tokens": [self._text_of(token.sampled.token) for token in tokens],
            "token_logprobs": [token.sampled.logprob for token in tokens],
            "top_logprobs": [self._top(token.sampled) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, sampled: Sampled) -> Json | None:
        """None for the first token of a prompt. Of two tokens with one text the likelier counts."""
        if sampled.logprob is None:
            return None
        top: Json = {}
        for other in sampled.alternatives:
            top.setdefault(self._text_of(other.token), other.logprob)
        return top

    def _behind(self, index: int, tokens: Sequence[Spoken]) -> Sequence[Spoken]:
        """Tokens of the answer where they stand in the whole text."""
        before = len(self._echoes[index].text) if self._echoes else 0
        return [Spoken(token.sampled, token.offset + before) for token in tokens] if before else tokens
