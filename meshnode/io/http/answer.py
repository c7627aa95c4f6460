"""Runs the generations of one request and writes the answer, streamed or whole.

Invariant: the generations live in this response's nursery, so a client that leaves, a server that stops and an
error all end them, and with them their lanes, at once; nothing depends on a generator being closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import msgspec
import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from meshnode.core.serving.request import Generation
from meshnode.errors import MeshError, Unavailable
from meshnode.io.http.backend import ServedModel
from meshnode.io.http.choice import PLAIN, Choice, Delta, Reading
from meshnode.io.http.failure import Dialect, failure_of
from meshnode.io.http.meter import ModelMeter, Timing
from meshnode.io.http.owners import owner_of
from meshnode.io.http.shapes import Shape, usage

FIRST_S: Final = 12.0
"""Until the first token an error can still have its own status: longer than the 10 s a request may queue."""
PING_S: Final = 10.0
"""Between comment pings while nothing else is sent: below the 15 s after which some proxies give up."""
GENERATIONS_AT_ONCE: Final = 4
"""Of one request: it fills the default lanes, never the queue behind them."""
EVENTS: Final = 64
"""Deltas that wait for a slow client; then its generations wait."""

RELAXED: Final = {"x-meshnode-schema": "relaxed"}
"""Of an answer whose schema could not be enforced whole, and was not strict."""
WRITERS: Final = trio.CapacityLimiter(1)
"""A scored prompt of 131,072 tokens takes 0.7 s to write down: in a thread, and one at a time."""

Event = Delta | MeshError


class Draining:
    """Counts the answers in progress, and tells each of them when the server ends."""

    def __init__(self) -> None:
        self._end = trio.Event()
        self._idle = trio.Event()
        self._answers = 0

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around one answer."""
        self._answers += 1
        try:
            yield
        finally:
            self._answers -= 1
            if not self._answers:
                self._idle.set()
                self._idle = trio.Event()

    async def wait_idle(self) -> None:
        """Until no answer is in progress."""
        if self._answers:
            await self._idle.wait()

    def end(self) -> None:
        """Ends streams with a terminal error; may be called more than once."""
        self._end.set()

    async def wait(self) -> None:
        """Until `end`."""
        await self._end.wait()


class Job(msgspec.Struct, frozen=True):
    """What to generate, and how its text ends. One generation per choice, in the order of their indexes."""

    generations: tuple[Generation, ...]
    stops: tuple[str, ...]
    stream: bool
    prompt_tokens: int
    reading: Reading = PLAIN
    reuse: bool = True
    """Whether a prompt may begin with what the same owner's requests left, and leave itself. False: every row of it is
    computed."""
    repeatable: bool = False
    """Whether it begins only with what changes no bit of the answer."""
    relaxed: bool = False
    """The answer keeps to less than its schema, which was not strict."""


class Answer(Response):
    """A response that generates while it is sent."""

    def __init__(self, model: ServedModel, job: Job, shape: Shape, draining: Draining, meter: ModelMeter) -> None:
        super().__init__()
        self._meter = meter
        self._began = trio.current_time()
        self._model = model
        self._job = job
        self._shape = shape
        self._draining = draining
        self._choices = [Choice(i, model.vocabulary, job.stops, job.reading) for i in range(len(job.generations))]
        self._limiter = trio.CapacityLimiter(GENERATIONS_AT_ONCE)
        self._owner: str | None = None
        self._cached: dict[tuple[int, ...], int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI response."""
        self._meter.prompt_tokens += self._job.prompt_tokens
        self._owner = owner_of(scope) if self._job.reuse else None
        with self._draining.answering():
            ending = await self._run(receive, send)
            if ending is not None:
                await ending(scope, receive, send)

    async def _run(self, receive: Receive, send: Send) -> Response | None:
        """All generations, and what is left to send when they are over; None when the client left."""
        into, events = trio.open_memory_channel[Event](EVENTS)
        ending: Response | None = None
        async with trio.open_nursery() as nursery, into, events:
            nursery.start_soon(cancel_on_disconnect, receive, nursery.cancel_scope.cancel)
            nursery.start_soon(self._end_when_draining, into)
            for choice, generation in zip(self._choices, self._job.generations, strict=True):
                nursery.start_soon(self._generate, choice, generation, into)
            ending = await (self._stream(events, send) if self._job.stream else self._whole(events))
            nursery.cancel_scope.cancel()
        return ending

    async def _generate(self, choice: Choice, generation: Generation, into: trio.MemorySendChannel[Event]) -> None:
        timing = Timing(self._meter, self._began)
        repeatable = self._job.repeatable
        generation = msgspec.structs.replace(generation, owner=self._owner, repeatable=repeatable)
        try:
            async with self._limiter, self._model.generate(generation) as tokens:
                async for sampled in tokens:
                    timing.token(trio.current_time())
                    if not choice.generated:
                        self._note_cached(generation, sampled.cached)
                    delta = choice.feed(sampled)
                    if sampled.prompt:
                        delta = msgspec.structs.replace(delta, prompt=sampled.prompt)
                    if delta.text or delta.thought or delta.calls or delta.tokens or delta.finish or delta.prompt:
                        await into.send(delta)
                    if delta.finish:
                        timing.ended(delta.finish)
                        return
                raise Unavailable("the generation ended without its last token")
        except MeshError as error:
            timing.ended("error")
            await into.send(error)
        finally:
            timing.close()

    async def _end_when_draining(self, into: trio.MemorySendChannel[Event]) -> None:
        await self._draining.wait()
        await into.send(Unavailable("this node is shutting down"))

    def _note_cached(self, generation: Generation, tokens: int) -> None:
        """Of several choices of one prompt the least counts, as the prompt itself counts once."""
        self._meter.cached_tokens += tokens
        prompt = generation.prompt
        self._cached[prompt] = min(tokens, self._cached.get(prompt, tokens))

    def _counts(self) -> dict[str, Any]:
        generated = sum(choice.generated for choice in self._choices)
        thought = sum(choice.thought for choice in self._choices)
        return usage(self._job.prompt_tokens, generated, thought, sum(self._cached.values()))

    async def _whole(self, events: trio.MemoryReceiveChannel[Event]) -> Response:
        """The answer, when all choices are complete."""
        deltas: list[list[Delta]] = [[] for _ in self._choices]
        unfinished = len(self._choices)
        while unfinished:
            event = await events.receive()
            if isinstance(event, MeshError):
                return failure_of(event).response(self._shape.dialect)
            deltas[event.index].append(event)
            unfinished -= bool(event.finish)

        def write() -> Response:
            response = json_response(self._shape.whole(deltas, self._counts()))
            response.headers.update(RELAXED if self._job.relaxed else {})
            return response

        if self._job.generations[0].scored:
            return await trio.to_thread.run_sync(write, limiter=WRITERS)
        return write()

    async def _stream(self, events: trio.MemoryReceiveChannel[Event], send: Send) -> Response:
        """Send everything but the end of the stream, which is returned."""
        event: Event | None = None
        with trio.move_on_after(FIRST_S):
            event = await events.receive()
        if isinstance(event, MeshError):
            return failure_of(event).response(self._shape.dialect)
        stream = EventStream(send)
        await stream.start(RELAXED if self._job.relaxed else {})
        for choice in self._choices:
            for chunk in self._shape.opening(choice.index):
                await stream.data(chunk)
        unfinished = len(self._choices)
        while True:
            if isinstance(event, MeshError):
                await stream.data(failure_of(event).event(self._shape.dialect))
                return EndOfStream()
            if event is None:
                await stream.ping()
            else:
                for chunk in self._shape.chunks(event):
                    await stream.data(chunk)
                unfinished -= bool(event.finish)
            if not unfinished:
                for chunk in self._shape.closing(self._counts()):
                    await stream.data(chunk)
                if self._shape.dialect is Dialect.CHAT:
                    await stream.done()
                return EndOfStream()
            event = None
            with trio.move_on_after(PING_S):
                event = await events.receive()


class EventStream:
    """Server-sent events by hand: data, comment pings, the final `[DONE]`."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def start(self, more: Mapping[str, str]) -> None:
        """Status and headers; the third keeps proxies from collecting chunks."""
        headers = [
            (b"content-type", b"text/event-stream"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            *((name.encode(), value.encode()) for name, value in more.items()),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def data(self, payload: dict[str, Any]) -> None:
        """One event, under the name that its `type` is, where it has one."""
        name = f"event: {payload['type']}\n".encode() if "type" in payload else b""
        await self._write(name + b"data: " + msgspec.json.encode(payload) + b"\n\n")

    async def ping(self) -> None:
        """A comment, which every client ignores."""
        await self._write(b": ping\n\n")

    async def done(self) -> None:
        """The end as OpenAI's clients expect it."""
        await self._write(b"data: [DONE]\n\n")

    async def _write(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": True})


class EndOfStream(Response):
    """The last message of a response that was begun.

    It must be sent where no disconnect cancels it: hypercorn reports a response's own end as one, and what it does
    after that (the next request, the idle timer, closing) would be cut short.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Nothing follows."""
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def json_response(payload: Any, status: int = 200) -> Response:
    """`payload`, anything msgspec encodes, as a whole answer."""
    return Response(msgspec.json.encode(payload), status, media_type="application/json")


async def cancel_on_disconnect(receive: Receive, cancel: Callable[[], object]) -> None:
    """The only place that notices a client that left a request which does not stream."""
    while (await receive())["type"] != "http.disconnect":
        pass
    cancel()
