"""A served model without a model: one token per byte, answers given by the test."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager

import trio

from meshnode.core.serving.events import Statistics
from meshnode.core.serving.request import Alternative, Generation, Sampled
from meshnode.core.serving.text import Conversation, Vocabulary
from meshnode.errors import InvalidRequest, MeshError, PromptTooLong, Unavailable
from meshnode.io.http.backend import ModelListing, ModelState, PassedAnswer, PassedRequest

BOS, END, HUGE = 256, 257, 258
VOCABULARY = Vocabulary(
    pieces=(*(bytes([value]) for value in range(256)), b"", b"", b"x" * 2**20),
    markers={BOS: b"<|bos|>", END: b"<|end|>"},
    end=frozenset({END}),
    bos=BOS,
    eos=END,
    add_bos=True,
)


class ByteModel:
    """Answers every prompt with `answer`."""

    def __init__(self, answer: str = "Hello, wörld.", name: str = "org/byte-model") -> None:
        self.id = name
        self.created = 1_700_000_000
        self.context = 512
        self.vocabulary = VOCABULARY
        self.fingerprint = "fp_bytes"
        self.answer: list[int] = [*answer.encode(), END]
        self.stall_at = -1
        """Index of the token that never comes; -1: none."""
        self.hold_at = -1
        """Index of the token that waits for `go_on`."""
        self.go_on = trio.Event()
        self.fails_with: MeshError | None = None
        """Raised at `stall_at`, or on entry."""
        self.seen: list[Generation] = []
        self.conversations: list[Conversation] = []
        self.cached = 0
        """Rows of a prompt that a lane is said to hold, for requests that may use them."""
        self.grammars: list[str] = []
        """Those that were checked."""
        self.refuses = ""
        """What no grammar may hold."""
        self.lanes = 0
        self.waiting = trio.Event()
        """Set when a generation reached `stall_at` or `hold_at`."""
        self.freed = trio.Event()
        """Set when the last lane was given back."""

    async def check_grammar(self, grammar: str, *, gbnf: bool = False) -> str:
        self.grammars.append(grammar)
        if self.refuses and self.refuses in grammar:
            raise InvalidRequest(f"it has {self.refuses}")
        return f"gbnf: {grammar}" if gbnf else grammar

    def statistics(self) -> Statistics:
        counts = dict.fromkeys(Statistics.__struct_fields__, 0)
        busy = {"lanes": 4, "lanes_busy": self.lanes, "context": self.context, "rejected": {}}
        return Statistics(**{**counts, **busy})

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> tuple[int, ...]:
        head, ids = ([BOS] if add_special else []), []
        for index, part in enumerate(text.split("<|bos|>")):
            ids += ([BOS] if index else []) + list(part.encode())
        return tuple(head + ids)

    async def render(self, conversation: Conversation) -> str:
        self.conversations.append(conversation)
        turns = [f"{each['role']}: {each['content']}\n" for each in conversation.messages]
        return "".join(turns) + "assistant:"

    def generate(self, request: Generation) -> AbstractAsyncContextManager[AsyncIterator[Sampled]]:
        return self._lane(request)

    @asynccontextmanager
    async def _lane(self, request: Generation) -> AsyncIterator[AsyncIterator[Sampled]]:
        self.seen.append(request)
        if self.fails_with is not None and self.stall_at < 0:
            raise self.fails_with
        if len(request.prompt) >= self.context:
            raise PromptTooLong(len(request.prompt), self.context)
        self.lanes += 1
        tokens = self._tokens(request)
        try:
            async with aclosing(tokens):
                yield tokens
        finally:
            self.lanes -= 1
            if not self.lanes:
                self.freed.set()

    async def _tokens(self, request: Generation) -> AsyncGenerator[Sampled, None]:
        for index, token in enumerate(self.answer):
            await trio.lowlevel.checkpoint()
            if index == self.hold_at:
                self.waiting.set()
                await self.go_on.wait()
            if index == self.stall_at:
                self.waiting.set()
                if self.fails_with is not None:
                    raise self.fails_with
                await trio.sleep_forever()
            finish = "stop" if token == END else "length" if index + 1 == request.max_tokens else ""
            top = max(request.sampling.top_logprobs, 0)
            alternatives = tuple(Alternative((token + other) % 256, -0.5 - other) for other in range(top))
            logprob = -0.5 if request.sampling.top_logprobs >= 0 else None
            cached = 0 if index or request.owner is None else min(self.cached, len(request.prompt) - 1)
            prompt = self._scores(request, top) if request.scored and not index else ()
            yield Sampled(token, logprob, alternatives, finish, prompt, cached)
            if finish:
                return

    def _scores(self, request: Generation, top: int) -> tuple[Sampled, ...]:
        """Token i of a prompt is as likely as -i, and the second likeliest."""
        return tuple(
            Sampled(token, -float(at), tuple(Alternative((token + 1 - k) % 256, 0.5 - at - k) for k in range(top)))
            for at, token in enumerate(request.prompt)
            if at
        )


class ByteDirectory:
    """Models here, and models elsewhere that `remote` answers for."""

    def __init__(self, *models: ByteModel) -> None:
        self.served = {model.id: model for model in models}
        self.elsewhere: dict[str, Callable[[PassedRequest], AbstractAsyncContextManager[PassedAnswer]]] = {}
        self.states: dict[str, ModelState] = {}
        self.numbers = {"rejected_queue_full": 0}

    def models(self) -> tuple[ModelListing, ...]:
        names = sorted({*self.served, *self.elsewhere, *self.states})
        return tuple(ModelListing(name, 1_700_000_000, 512, self.states.get(name, "ready"), "here") for name in names)

    def local(self, model_id: str, *, passed: bool) -> ByteModel | None:
        ready = self.states.get(model_id, "ready") == "ready"
        return self.served.get(model_id) if ready else None

    def here(self) -> tuple[ByteModel, ...]:
        return tuple(self.served.values())

    def pass_on(self, model_id: str, request: PassedRequest) -> AbstractAsyncContextManager[PassedAnswer]:
        if model_id not in self.elsewhere:
            raise Unavailable("nobody serves it now")
        return self.elsewhere[model_id](request)

    def counters(self) -> dict[str, int]:
        return self.numbers
