"""What clients may ask: the request bodies of chat/completions and completions.

Unknown fields are ignored, `null` means the default, a wrong type is a 400 that names the field. What is known but
not done (`best_of` other than `n`) is refused, never silently dropped.
"""

from __future__ import annotations

import secrets
from typing import Any, Final

import msgspec

from meshnode.core.serving.grammar import Schema
from meshnode.core.serving.text import STOP_CHARACTERS, STOP_STRINGS, Conversation
from meshnode.errors import InvalidRequest
from meshnode.io.http.turns import Message, Tool, check_tools, turn_of
from meshnode.wire.sampling import MAX_TOP, Sampling

CHOICES: Final = 128
"""Choices of one request, prompts x n: OpenAI's bound for `n`."""
MESSAGES: Final = 4096
"""Messages of one chat: agents send some hundreds."""
NEVER: Final = -1e9
"""A bias under which no token is drawn: llama.cpp's minus infinity, as a number that travels."""
BEST_ONLY: Final = 1e-9
"""What OpenAI's smallest `top_p`, 0, means: of the most likely tokens the first reaches it."""
DEFAULT_COMPLETION_TOKENS: Final = 16
"""OpenAI's default of the legacy route."""


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream carries besides text."""

    include_usage: bool | None = None


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that both generation routes share, with llama.cpp's names for what OpenAI does not have."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float | bool] | list[tuple[int, float | bool]] | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    """False: every token of the prompt is computed, and nothing of the request is kept for another."""
    grammar: str | None = None
    json_schema: Any = None

    def choices(self) -> int:
        """How many answers per prompt."""
        count = 1 if self.n is None else self.n
        if not 1 <= count <= CHOICES:
            raise InvalidRequest(f"n must lie between 1 and {CHOICES}", "n")
        return count

    def stops(self) -> tuple[str, ...]:
        """Stop strings, empty ones dropped."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > STOP_STRINGS or any(len(stop) > STOP_CHARACTERS for stop in stops):
            raise InvalidRequest(f"stop has at most {STOP_STRINGS} strings of {STOP_CHARACTERS} characters", "stop")
        return tuple(stop for stop in stops if stop)

    def token_limit(self, default: int | None) -> int | None:
        """Tokens to generate at most; None: until the context is full (`-1` asks for that too)."""
        return _limit(self.max_tokens, "max_tokens", default)

    def with_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, top_logprobs: int) -> Sampling:
        """The sampler's parameters; InvalidRequest for an impossible value."""
        given = {
            "temperature": self.temperature, "top_k": self.top_k, "min_p": self.min_p, "typical_p": self.typical_p,
            "top_p": BEST_ONLY if self.top_p == 0 else self.top_p, "repeat_penalty": self.repeat_penalty,
            "penalty_window": self.repeat_last_n, "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty, "ignore_eos": self.ignore_eos,
        }  # fmt: skip
        chosen = {"seed": self._seed(), "logit_bias": self._biases(), "top_logprobs": top_logprobs}
        known = {name: value for name, value in given.items() if value is not None}
        sampling = msgspec.convert({**chosen, **known}, Sampling)
        if defect := sampling.defect().replace("penalty_window", "repeat_last_n"):
            raise InvalidRequest(defect, defect.partition(" ")[0])
        return sampling

    def _seed(self) -> int:
        """llama.cpp's convention: no seed or -1 is a random one; other negative seeds count from 2**64."""
        return secrets.randbits(64) if self.seed is None or self.seed == -1 else self.seed % 2**64

    def _biases(self) -> tuple[tuple[int, float], ...]:
        given = self.logit_bias or {}
        pairs = given.items() if isinstance(given, dict) else given
        try:
            biases = [(int(token), bias) for token, bias in pairs]
        except ValueError:
            raise InvalidRequest("logit_bias maps token ids to numbers", "logit_bias") from None
        if any(bias is True for _, bias in biases):
            raise InvalidRequest("a logit_bias is a number, or false for never", "logit_bias")
        return tuple((token, NEVER if bias is False else bias) for token, bias in biases)


class Conversing(SamplingFields, frozen=True, kw_only=True):
    """Fields of every route that turns messages into a prompt."""

    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    """Whether the prompt ends with the beginning of the answer."""
    reasoning_effort: str | None = None

    def offered_tools(self) -> list[Tool]:
        """Those that the model is told of. InvalidRequest for what could not be kept to."""
        if self.functions:
            raise InvalidRequest("functions is not supported; tools took its place", "functions")
        check_tools(self.tools or [])
        return [] if self.tool_choice == "none" else self.tools or []

    def callable_tools(self) -> list[Tool]:
        """Those that may be called: all that are offered, or the one that tool_choice names."""
        tools, choice = self.offered_tools(), self.tool_choice
        if choice in (None, "auto", "none"):
            return tools
        if choice == "required":
            named = tools
        else:
            name = _chosen(choice)
            named = [tool for tool in tools if tool.function.name == name]
        if not named:
            raise InvalidRequest("tool_choice demands a call, and there is no such tool", "tool_choice")
        return named

    def forces_calls(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice not in (None, "auto", "none")

    def as_conversation(self) -> Conversation:
        """Messages as templates expect them: content as one text, developer as system."""
        messages = self.messages or []
        if not 1 <= len(messages) <= MESSAGES:
            raise InvalidRequest(f"messages must hold between 1 and {MESSAGES} messages", "messages")
        turns = tuple(turn_of(message, f"messages[{index}]") for index, message in enumerate(messages))
        variables = dict(self.chat_template_kwargs or {})
        if tools := self.offered_tools():
            variables["tools"] = [tool.shown() for tool in tools]
        if self.add_generation_prompt is not None:
            variables["add_generation_prompt"] = self.add_generation_prompt
        if self.reasoning_effort is not None:
            variables["reasoning_effort"] = self.reasoning_effort
            # Qwen's templates, and those that followed them, know no effort but this switch.
            variables.setdefault("enable_thinking", self.reasoning_effort != "none")
        return Conversation(turns, variables)


class JsonFormat(msgspec.Struct, frozen=True):
    """A named schema, as OpenAI writes it."""

    name: str | None = None
    schema: Any = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """Which shape the answer must have."""

    type: str
    json_schema: JsonFormat | None = None
    schema: Any = None
    """llama.cpp's way to give one with `json_object`."""


class ChatRequest(Conversing, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    reasoning_format: str | None = None

    def refuse_unsupported(self) -> None:
        """InvalidRequest for what would otherwise be silently dropped."""
        self.callable_tools()
        self.demanded_schema()

    def demanded_schema(self) -> tuple[Schema | None, str]:
        """The schema of the answer, and the field that gives it: "" for none."""
        given = self.response_format or ResponseFormat("text")
        if given.type != "text" and self.json_schema is not None:
            raise InvalidRequest("response_format and json_schema exclude each other", "json_schema")
        match given.type:
            case "text" if self.json_schema is not None:
                return Schema(self.json_schema, strict=True), "json_schema"
            case "text":
                return None, ""
            case "json_object":
                wanted = {"type": "object"} if given.schema is None else given.schema
                return Schema(wanted, strict=True), "response_format"
            case "json_schema" if given.json_schema is not None and given.json_schema.schema is not None:
                return Schema(given.json_schema.schema, strict=bool(given.json_schema.strict)), "response_format"
            case "json_schema":
                raise InvalidRequest("a response_format `json_schema` needs json_schema.schema", "response_format")
        raise InvalidRequest("response_format is one of text, json_object, json_schema", "response_format")

    def splits_thoughts(self) -> bool:
        """Whether thoughts come as `reasoning_content`; llama-server's `none` leaves them in the text."""
        if self.reasoning_format not in (None, "auto", "deepseek", "none"):
            raise InvalidRequest("reasoning_format is one of auto, deepseek, none", "reasoning_format")
        return self.reasoning_format != "none"

    def token_limit(self, default: int | None = None) -> int | None:
        """`max_completion_tokens` is the newer name of `max_tokens`."""
        if self.max_completion_tokens is not None:
            return _limit(self.max_completion_tokens, "max_completion_tokens", default)
        return _limit(self.max_tokens, "max_tokens", default)

    def alternatives(self) -> int:
        """Sampling.top_logprobs for this request."""
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP:
            raise InvalidRequest(f"top_logprobs must lie between 0 and {MAX_TOP}", "top_logprobs")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs `logprobs: true`", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else -1


def _chosen(choice: Any) -> str:
    """The name in a tool_choice of OpenAI's chats, or of its responses. InvalidRequest for anything else."""
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function", choice)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            return str(function["name"])
    raise InvalidRequest("tool_choice is one of none, auto, required, or names a function", "tool_choice")


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def refuse_unsupported(self) -> None:
        """InvalidRequest for what would otherwise be silently dropped."""
        if self.best_of is not None and self.best_of != self.choices():
            why = "only as many answers as are returned (n) are made; ask for n and choose"
            raise InvalidRequest(f"best_of other than n is not supported: {why}", "best_of")
        if self.scored and self.suffix:
            raise InvalidRequest("echo with logprobs scores a prompt as it is; leave suffix out", "suffix")

    @property
    def scored(self) -> bool:
        """Whether the log-probabilities of the prompt's own tokens are wanted."""
        return bool(self.echo) and self.logprobs is not None

    def token_limit(self, default: int | None) -> int | None:
        """With `echo` 0 as well: the prompt alone."""
        return 0 if self.echo and self.max_tokens == 0 else super().token_limit(default)

    def alternatives(self) -> int:
        """Sampling.top_logprobs for this request."""
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP:
            raise InvalidRequest(f"logprobs must lie between 0 and {MAX_TOP}", "logprobs")
        return -1 if self.logprobs is None else self.logprobs

    def prompts(self) -> list[str | tuple[int, ...]]:
        """One entry per prompt: text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and all(isinstance(entry, int) for entry in self.prompt):
            return [tuple(entry for entry in self.prompt if isinstance(entry, int))]
        prompts = [tuple(entry) if isinstance(entry, list) else entry for entry in self.prompt]
        texts = [entry for entry in prompts if not isinstance(entry, int)]
        if not 1 <= len(texts) == len(prompts) or len(texts) * self.choices() > CHOICES:
            message = f"prompt is a text, token ids, or a list of at most {CHOICES} (times n) of either"
            raise InvalidRequest(message, "prompt")
        return texts


def _limit(given: int | None, name: str, default: int | None) -> int | None:
    if given is None:
        return default
    if given == -1:
        return None
    if given < 1:
        raise InvalidRequest(f"{name} must be at least 1", name)
    return given
