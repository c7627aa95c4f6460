"""Prompts as token ids: a chat by the model's template, a text, or ids as they were given."""

from __future__ import annotations

from collections.abc import Iterable

from meshnode.core.serving.text import Conversation, Vocabulary
from meshnode.errors import InvalidRequest
from meshnode.io.http.backend import ServedModel


async def chat_prompt(model: ServedModel, conversation: Conversation) -> tuple[str, tuple[int, ...]]:
    """The text that the model's template makes of a chat, and its tokens."""
    text = await model.render(conversation)
    special = not _begins_with_bos(text, model.vocabulary)
    return text, await model.tokenize(text, add_special=special, parse_special=True)


async def prompt_ids(model: ServedModel, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
    """A prompt of the legacy route."""
    if isinstance(prompt, str):
        return await model.tokenize(prompt, add_special=True, parse_special=True)
    check_ids(prompt, model.vocabulary, "prompt")
    return prompt


async def filling_ids(model: ServedModel, prefix: tuple[int, ...], suffix: str) -> tuple[int, ...]:
    """A prompt whose answer stands between `prefix` and `suffix`. InvalidRequest where the model cannot fill in."""
    vocabulary = model.vocabulary
    if not vocabulary.fills:
        raise InvalidRequest("this model has no tokens for filling in (FIM), so it cannot take a suffix", "suffix")
    before, after, between = vocabulary.fim
    following = await model.tokenize(suffix, add_special=False, parse_special=False)
    # A first token of the model stays first.
    lead, rest = (prefix[:1], prefix[1:]) if prefix[:1] == (vocabulary.bos,) else ((), prefix)
    return (*lead, before, *rest, after, *following, between)


def check_ids(ids: Iterable[int], vocabulary: Vocabulary, field: str) -> None:
    """InvalidRequest for an id that the model does not know."""
    if not all(0 <= token < len(vocabulary.pieces) for token in ids):
        raise InvalidRequest(f"{field} holds a token id outside the vocabulary", field)


def _begins_with_bos(text: str, vocabulary: Vocabulary) -> bool:
    """Many templates write the first token themselves; llama.cpp would add a second one."""
    bos = vocabulary.written(vocabulary.bos).decode("utf-8", "replace")
    return bool(bos) and text.startswith(bos)
