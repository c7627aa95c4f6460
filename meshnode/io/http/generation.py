"""The two generation routes: from a request body to an answer that generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec
import trio
from starlette.responses import Response

from meshnode.core.serving.calls import format_of
from meshnode.core.serving.grammar import frame_of
from meshnode.core.serving.request import Generation
from meshnode.core.serving.text import Vocabulary
from meshnode.core.serving.thoughts import thinking_of
from meshnode.errors import InvalidRequest, PromptTooLong
from meshnode.io.http.answer import WRITERS, Answer, Draining, Job
from meshnode.io.http.backend import ServedModel
from meshnode.io.http.body import decode
from meshnode.io.http.choice import PLAIN, Reading
from meshnode.io.http.constraint import chat_grammar, completion_grammar
from meshnode.io.http.echo import Echo, echo_of
from meshnode.io.http.failure import Dialect
from meshnode.io.http.fields import DEFAULT_COMPLETION_TOKENS, NEVER, ChatRequest, CompletionRequest
from meshnode.io.http.meter import Meter
from meshnode.io.http.prompt import chat_prompt, check_ids, filling_ids, prompt_ids
from meshnode.io.http.shapes import ChatShape, CompletionShape, Shape
from meshnode.wire.sampling import CONSTRAINED_TOKENS, MAX_BIASES, Sampling

SCORES: Final = 256 * 1024
"""Log-probabilities of prompt tokens and of what was likelier that one request is told: 128 prompts of 1,024 tokens,
or one of 131,072, with one alternative each. 0.4 KB each while the answer is written."""


class GenerationRoutes:
    """chat/completions and completions."""

    def __init__(self, draining: Draining, meter: Meter) -> None:
        self._draining = draining
        self._meter = meter

    async def chat(self, model: ServedModel, body: bytes) -> Response:
        """POST chat/completions."""
        asked = decode(body, ChatRequest)
        shape = ChatShape(model, bool(asked.logprobs), asked.with_usage())
        return await self.converse(model, asked, lambda prompt_tokens: shape)

    async def converse(self, model: ServedModel, asked: ChatRequest, shape_of: Callable[[int], Shape]) -> Response:
        """The answer to a chat, written as `shape_of` (tokens of the prompt) says."""
        asked.refuse_unsupported()
        sampling = asked.sampling(asked.alternatives())
        reading = _reading(asked, model.vocabulary)
        count, stops, limit = asked.choices(), asked.stops(), asked.token_limit()
        text, prompt = await chat_prompt(model, asked.as_conversation())
        shape = shape_of(len(prompt))
        thinking = thinking_of(model.vocabulary.chat_template, text)
        told = thinking if reading.forced is not None or asked.splits_thoughts() else None
        # Where thoughts stay in the text, only one that the prompt began may stand before what was demanded.
        first = told if thinking is None or not thinking.begun else thinking
        demanded = await chat_grammar(model, asked, reading.calling, first)
        sampling = msgspec.structs.replace(sampling, grammar=demanded.grammar)
        with self._counting_refusals():
            generations = _generations(model, shape, [prompt] * count, count, limit, sampling)
        job = Job(
            generations=generations,
            stops=stops,
            stream=bool(asked.stream),
            prompt_tokens=len(prompt),
            reuse=asked.cache_prompt is not False,
            repeatable=asked.seed not in (None, -1),
            reading=msgspec.structs.replace(reading, thinking=told, pieces=shape.dialect is Dialect.CHAT),
            relaxed=demanded.relaxed,
        )
        return Answer(model, job, shape, self._draining, self._meter.of(model.id))

    async def completions(self, model: ServedModel, body: bytes) -> Response:
        """POST completions."""
        asked = decode(body, CompletionRequest)
        asked.refuse_unsupported()
        sampling = asked.sampling(asked.alternatives())
        count, stops, limit = asked.choices(), asked.stops(), asked.token_limit(DEFAULT_COMPLETION_TOKENS)
        prompts = [await prompt_ids(model, prompt) for prompt in asked.prompts()]
        if asked.scored:
            _check_scores(sum(map(len, prompts)) * count * (1 + asked.alternatives()))
        echoes = await self._echoed(model, prompts) if asked.echo else []
        if asked.suffix:
            prompts = [await filling_ids(model, ids, asked.suffix) for ids in prompts]
        each = [ids for ids in prompts for _ in range(count)]
        shape = CompletionShape(model, asked, [echo for echo in echoes for _ in range(count)])
        demanded = await completion_grammar(model, asked)
        sampling = msgspec.structs.replace(sampling, grammar=demanded.grammar)
        with self._counting_refusals():
            # A prompt's last row gives the token behind it: drawing that as well is less than leaving it out.
            generations = _generations(model, shape, each, count, 1 if limit == 0 else limit, sampling)
        if asked.scored:
            generations = tuple(msgspec.structs.replace(generation, scored=True) for generation in generations)
        job = Job(
            generations=generations,
            stops=stops,
            stream=bool(asked.stream),
            prompt_tokens=sum(map(len, prompts)),
            reuse=asked.cache_prompt is not False,
            repeatable=asked.seed not in (None, -1),
            reading=Reading(ending=asked.scored, silent=limit == 0),
        )
        return Answer(model, job, shape, self._draining, self._meter.of(model.id))

    async def _echoed(self, model: ServedModel, prompts: Sequence[tuple[int, ...]]) -> list[Echo]:
        """131,072 tokens take a quarter of a second: in a thread. More than the context holds are never written."""
        with self._counting_refusals():
            for ids in prompts:
                _room(model, ids)

        def written() -> list[Echo]:
            return [echo_of(model.vocabulary, ids) for ids in prompts]

        return await trio.to_thread.run_sync(written, limiter=WRITERS)

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        """A prompt that never fits does not reach the head, which counts the other refusals."""
        try:
            yield
        except PromptTooLong:
            self._meter.refused["prompt_too_long"] += 1
            raise


def _generations(
    model: ServedModel,
    shape: Shape,
    prompts: Sequence[tuple[int, ...]],
    count: int,
    limit: int | None,
    sampling: Sampling,
) -> tuple[Generation, ...]:
    """One generation per choice. Choices of one prompt differ by their seed, so that each can be repeated alone."""
    check_ids((token for token, _ in sampling.logit_bias), model.vocabulary, "logit_bias")
    if sampling.grammar:
        limit = CONSTRAINED_TOKENS if limit is None else min(limit, CONSTRAINED_TOKENS)
    if sampling.ignore_eos:
        sampling = _endless(sampling, model.vocabulary)
    generations = []
    for index, prompt in enumerate(prompts):
        room = _room(model, prompt)
        seed = (sampling.seed + index % count) % 2**64
        generations.append(
            Generation(
                id=f"{shape.id}-{index}",
                prompt=prompt,
                max_tokens=room if limit is None else min(limit, room),
                sampling=msgspec.structs.replace(sampling, seed=seed),
            )
        )
    return tuple(generations)


def _room(model: ServedModel, prompt: tuple[int, ...]) -> int:
    """Tokens that fit behind it. Raises InvalidRequest, PromptTooLong."""
    if not prompt:
        raise InvalidRequest("the prompt is empty", "prompt")
    room = model.context - len(prompt)
    if room < 1:
        raise PromptTooLong(len(prompt), model.context)
    return room


def _check_scores(count: int) -> None:
    if count > SCORES:
        message = (
            f"this asks for {count} log-probabilities of prompt tokens, at most {SCORES} are told at once: send fewer "
            "prompts in a request, shorter ones, or a smaller logprobs"
        )
        raise InvalidRequest(message, "logprobs")


def _reading(asked: ChatRequest, vocabulary: Vocabulary) -> Reading:
    """What calls look like. InvalidRequest for tools where the model knows none."""
    tools = asked.callable_tools()
    if not tools:
        return PLAIN
    known = format_of(vocabulary.chat_template)
    if known is None:
        raise InvalidRequest("the chat template of this model has no tools, or in a form not known here", "tools")
    if asked.forces_calls():
        return Reading(calling=known, forced=frame_of(known, vocabulary.chat_template))
    return Reading(
        None, known, {tool.function.name: tool.texts() for tool in tools}, asked.parallel_tool_calls is False
    )


def _endless(sampling: Sampling, vocabulary: Vocabulary) -> Sampling:
    """As llama.cpp reads `ignore_eos`: tokens that end an answer are never drawn, instead of drawn and passed over.

    A file with so many that they do not travel keeps them; the head passes over them.
    """
    never = tuple((token, NEVER) for token in sorted(vocabulary.end))
    if len(sampling.logit_bias) + len(never) > MAX_BIASES:
        return sampling
    return msgspec.structs.replace(sampling, logit_bias=(*sampling.logit_bias, *never))
