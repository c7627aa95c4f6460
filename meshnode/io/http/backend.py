"""What the endpoint needs from the rest of the node: the contract that app implements.

The endpoint knows models by their id and nothing of nodes, plans or stages. A model is served here (its head runs
in this node) or elsewhere; then the whole request is passed on and the answer comes back as bytes.

Invariant: an answer that was passed on is not interpreted here, so a node can pass on what it does not know.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

import msgspec

from meshnode.core.serving.events import Statistics
from meshnode.core.serving.request import Generator
from meshnode.core.serving.text import Conversation, Vocabulary

ModelState = Literal["loading", "ready", "failed"]


class ModelListing(msgspec.Struct, frozen=True):
    """One model of the mesh, wherever it runs."""

    id: str
    created: int
    """Unix time in seconds: when its run was started."""
    context: int
    """Tokens one request may use at most, prompt and answer together; 0 while not known."""
    state: ModelState
    where: str
    """The node of its head, as people see it."""


class ServedModel(Generator, Protocol):
    """A model whose head runs in this node. `generate` comes from Generator."""

    @property
    def id(self) -> str:
        """The name clients ask for."""
        ...

    @property
    def created(self) -> int:
        """Unix time in seconds."""
        ...

    @property
    def context(self) -> int:
        """Tokens one request may use at most, prompt and answer together."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """What the model's tokens say."""
        ...

    @property
    def fingerprint(self) -> str:
        """A word for its weights and how they are spread: answers to one seed may differ where it does."""
        ...

    def statistics(self) -> Statistics:
        """Lanes, queue and cells of its head, now."""
        ...

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> tuple[int, ...]:
        """Token ids of `text`; with `add_special` the model's own first tokens, with `parse_special` markers in it.

        Raises InvalidRequest (text too long), StageError or StageLost (the native part failed), Unavailable.
        """
        ...

    async def render(self, conversation: Conversation) -> str:
        """The prompt text of a chat by the model's own template, the beginning of the answer included.

        Raises InvalidRequest (the template refuses this conversation), StageError, StageLost, Unavailable.
        """
        ...

    async def check_grammar(self, grammar: str, *, gbnf: bool = False) -> str:
        """The grammar as the sampler reads it (core.serving.grammar), from that itself or from llama.cpp's GBNF.

        Raises InvalidRequest: no answer can be made to keep to it.
        """
        ...


class StageFigures(msgspec.Struct, frozen=True):
    """What one stage process of this node computed since it was loaded."""

    deployment: str
    stage: int
    microbatches: int = 0
    rows: int = 0
    failures: int = 0
    compute_us: int = 0
    overhead_us: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    cells_used: int = 0


class NodeFigures(msgspec.Struct, frozen=True):
    """What only the node knows, for `/metrics`."""

    stages: tuple[StageFigures, ...] = ()
    counters: dict[str, int] = {}


class PassedRequest(msgspec.Struct, frozen=True):
    """An API request on its way to the node that serves its model. Headers hold no key and no hop-by-hop field."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


class PassedAnswer(Protocol):
    """What came back. `chunks` is read once; leaving the context of `pass_on` ends the request over there."""

    @property
    def status(self) -> int:
        """HTTP status."""
        ...

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """Lower-case names."""
        ...

    @property
    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives; ends with LinkLost when the other node is lost."""
        ...


class Directory(Protocol):
    """Which models there are and where."""

    def models(self) -> tuple[ModelListing, ...]:
        """All models of the mesh, each id once, in a stable order."""
        ...

    def local(self, model_id: str, *, passed: bool) -> ServedModel | None:
        """The model if its head runs here, is ready, and is the one to ask.

        A request that was `passed` on by another node is served here if at all; any other may wait less elsewhere.
        """
        ...

    def here(self) -> Sequence[ServedModel]:
        """Every head of this node that takes requests; several may be of one model."""
        ...

    def pass_on(self, model_id: str, request: PassedRequest) -> AbstractAsyncContextManager[PassedAnswer]:
        """Send the request to the node that serves `model_id`.

        Raises on entry: Unavailable (nobody serves it now), LinkLost. Leaving the context cancels it over there.
        """
        ...

    def counters(self) -> Mapping[str, int]:
        """Numbers for `/health`: rejections by reason, lanes in use, requests waiting."""
        ...
