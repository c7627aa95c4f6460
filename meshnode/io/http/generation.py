"""The two generation routes: from a request body to an answer that generates, here or on the model's own node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from meshnode.core.serving.request import Generation
from meshnode.core.serving.text import Conversation, Detokenizer, Vocabulary
from meshnode.errors import InvalidRequest, PromptTooLong, Unavailable
from meshnode.io.http.answer import Answer, Draining, Job
from meshnode.io.http.backend import Directory, PassedRequest, ServedModel
from meshnode.io.http.body import decode, read_body
from meshnode.io.http.failure import model_not_found
from meshnode.io.http.fields import DEFAULT_COMPLETION_TOKENS, ChatRequest, CompletionRequest
from meshnode.io.http.passing import PassedOn, was_passed_on
from meshnode.io.http.shapes import ChatShape, CompletionShape, Shape
from meshnode.wire.sampling import Sampling

PASSED_HEADERS: Final = ("content-type", "accept")
"""All that the other node needs; keys and cookies stay here."""


class _Named(msgspec.Struct, frozen=True):
    model: str | None = None


class GenerationRoutes:
    """chat/completions and completions."""

    def __init__(self, directory: Directory, draining: Draining) -> None:
        self._directory = directory
        self._draining = draining

    async def chat(self, request: Request) -> Response:
        """POST chat/completions."""
        body = await read_body(request)
        model = self._find(body, was_passed_on(request.scope))
        if isinstance(model, str):
            return self._pass_on(model, request, body)
        asked = decode(body, ChatRequest)
        asked.refuse_unsupported()
        sampling = asked.sampling(asked.alternatives())
        conversation = Conversation(tuple(asked.conversation()), asked.chat_template_kwargs or {})
        count, stops, limit = asked.choices(), asked.stops(), asked.token_limit()
        text = await model.render(conversation)
        prompt = await model.tokenize(
            text, add_special=not _begins_with_bos(text, model.vocabulary), parse_special=True
        )
        shape = ChatShape(model.id, model.vocabulary, bool(asked.logprobs), asked.with_usage())
        job = Job(
            generations=_generations(model, shape, [prompt] * count, count, limit, sampling),
            stops=stops,
            stream=bool(asked.stream),
            with_usage=asked.with_usage(),
            prompt_tokens=len(prompt),
        )
        return Answer(model, job, shape, self._draining)

    async def completions(self, request: Request) -> Response:
        """POST completions."""
        body = await read_body(request)
        model = self._find(body, was_passed_on(request.scope))
        if isinstance(model, str):
            return self._pass_on(model, request, body)
        asked = decode(body, CompletionRequest)
        asked.refuse_unsupported()
        sampling = asked.sampling(asked.alternatives())
        count, stops, limit = asked.choices(), asked.stops(), asked.token_limit(DEFAULT_COMPLETION_TOKENS)
        prompts = [await _prompt_ids(model, prompt) for prompt in asked.prompts()]
        each = [ids for ids in prompts for _ in range(count)]
        echoes = [_text(model.vocabulary, ids) for ids in each] if asked.echo else []
        shape = CompletionShape(model.id, model.vocabulary, asked.logprobs is not None, echoes)
        job = Job(
            generations=_generations(model, shape, each, count, limit, sampling),
            stops=stops,
            stream=bool(asked.stream),
            with_usage=asked.with_usage(),
            prompt_tokens=sum(map(len, prompts)),
        )
        return Answer(model, job, shape, self._draining)

    def _find(self, body: bytes, passed: bool) -> ServedModel | str:
        """The model if it is to be served here, otherwise the id under which to pass the request on."""
        listings = self._directory.models()
        name = decode(body, _Named).model
        if not name:
            if len(listings) > 1:
                raise InvalidRequest("model is required where several are served", "model")
            name = listings[0].id if listings else ""
        if (local := self._directory.local(name, passed=passed)) is not None:
            return local
        listing = next((each for each in listings if each.id == name), None)
        if listing is None:
            if not listings:
                raise Unavailable("no model is served in this mesh yet")
            raise model_not_found(name)
        if listing.state == "loading":
            raise Unavailable("Loading model")
        if listing.state == "failed":
            raise Unavailable("the model could not be loaded; `meshnode status` says why")
        return name

    def _pass_on(self, model_id: str, request: Request, body: bytes) -> Response:
        if was_passed_on(request.scope):
            # The sender's view was stale. Sending it further could go round in circles.
            raise Unavailable("the model moved to another node; try again")
        headers = tuple((name, request.headers[name]) for name in PASSED_HEADERS if name in request.headers)
        passed = PassedRequest(request.method, request.url.path, headers, body)
        return PassedOn(self._directory, model_id, passed, self._draining)


async def _prompt_ids(model: ServedModel, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return await model.tokenize(prompt, add_special=True, parse_special=True)
    if not all(0 <= token < len(model.vocabulary.pieces) for token in prompt):
        raise InvalidRequest("prompt holds a token id outside the vocabulary", "prompt")
    return prompt


def _generations(
    model: ServedModel,
    shape: Shape,
    prompts: Sequence[tuple[int, ...]],
    count: int,
    limit: int | None,
    sampling: Sampling,
) -> tuple[Generation, ...]:
    """One generation per choice. Choices of one prompt differ by their seed, so that each can be repeated alone."""
    if any(not 0 <= token < len(model.vocabulary.pieces) for token, _ in sampling.logit_bias):
        raise InvalidRequest("logit_bias holds a token id outside the vocabulary", "logit_bias")
    generations = []
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise InvalidRequest("the prompt is empty", "prompt")
        room = model.context - len(prompt)
        if room < 1:
            raise PromptTooLong(len(prompt), model.context)
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


def _begins_with_bos(text: str, vocabulary: Vocabulary) -> bool:
    """Many templates write the first token themselves; llama.cpp would add a second one."""
    bos = vocabulary.written(vocabulary.bos).decode("utf-8", "replace")
    return bool(bos) and text.startswith(bos)


def _text(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    detokenizer = Detokenizer()
    return "".join([detokenizer.feed(vocabulary.shown(token)) for token in ids]) + detokenizer.finish()
