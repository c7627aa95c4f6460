"""Heads of the runs this node coordinates: connect to first and last stage, probe, serve.

Invariants: a head takes requests from `serve` to `drain`, and a request that found one is never sent to another that
does not; every head that was opened is reported once as opened or failed, and once more when it ends.
"""

from __future__ import annotations

import hashlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode import __version__
from meshnode.app.hops import HopSeats
from meshnode.app.probes import Probes
from meshnode.app.shelf import ServableModel, unavailable
from meshnode.core.coordination.orders import Hops
from meshnode.core.node.events import Event, HeadDrained, HeadFailed, HeadOpened
from meshnode.core.node.status import HeadLoad
from meshnode.core.serving.events import Statistics
from meshnode.core.serving.options import ServingOptions
from meshnode.core.serving.prefixes import Reuse
from meshnode.core.serving.request import Generation, Sampled
from meshnode.core.serving.text import Conversation, Vocabulary
from meshnode.errors import MeshError, PeerError, RequestError, StageError, StageLost, first_of
from meshnode.identity.certificates import make_stage
from meshnode.identity.credentials import Credentials
from meshnode.identity.ids import NodeId
from meshnode.io.stage.headstream import HeadStream, secure
from meshnode.io.stage.pipeline import HeadPipeline
from meshnode.io.transport.tls import check_stage_peer, stage_context
from meshnode.wire.fence import Fence
from meshnode.wire.messages import Claim

log = logging.getLogger("meshnode.head")

OPEN_S = 25.0
"""Both connections and the probe; below the coordinator's own limit (run.CONNECT_S), so that the reason is known."""
DOUBT_S = 10.0
"""Between two looks at a run whose stages failed a request: a client whose requests fail must not make it probe all the
time, and a run that computes nonsense is not listed for longer than that."""


@dataclass(eq=False)
class ServedRun:
    """io.http.backend.ServedModel of one run."""

    model: ServableModel
    pipeline: HeadPipeline
    claim: Claim
    created: int
    present: Callable[[str], ServedRun | None]
    """The run of a deployment that takes requests at the moment."""
    streams: int = 0
    """Generations under way."""
    draining: bool = False
    drained: trio.Event = field(default_factory=trio.Event)
    doubted: trio.Event = field(default_factory=trio.Event)
    """A stage failed somebody's request: perhaps that one, perhaps every one."""

    @property
    def id(self) -> str:
        """The name clients ask for."""
        return self.claim.model

    @property
    def context(self) -> int:
        """Tokens one request may use."""
        return self.claim.options.context

    @property
    def vocabulary(self) -> Vocabulary:
        """What tokens say."""
        return self.model.vocabulary

    @property
    def fingerprint(self) -> str:
        """Of the model's bytes, the version, and where the layers are cut."""
        cuts = tuple(stage.first for stage in self.claim.stages)
        spread = (self.claim.manifest_digest, __version__, cuts, self.claim.options.kv_type)
        return "fp_" + hashlib.sha256(repr(spread).encode()).hexdigest()[:12]

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> tuple[int, ...]:
        """Token ids of `text`."""
        return await self.model.tokenizer.tokenize(text, add_special=add_special, parse_special=parse_special)

    async def render(self, conversation: Conversation) -> str:
        """The prompt of a chat."""
        return await self.model.tokenizer.render(conversation)

    async def check_grammar(self, grammar: str, *, gbnf: bool = False) -> str:
        """The grammar as stages read it."""
        return await self.model.tokenizer.check_grammar(grammar, gbnf=gbnf)

    def statistics(self) -> Statistics:
        """Of its head."""
        return self.pipeline.statistics()

    def counters(self) -> dict[str, int]:
        """Lanes, queue and rejections, for /health."""
        now = self.pipeline.statistics()
        rejected = {f"rejected_{reason}": count for reason, count in now.rejected.items()}
        return {"lanes": now.lanes, "lanes_busy": now.lanes_busy, "queued": now.queued, **rejected}

    def load(self) -> HeadLoad:
        """What it has to do, for people."""
        now = self.pipeline.statistics()
        counts = {name: getattr(now, name) for name in HeadLoad.__struct_fields__ if name != "bubble"}
        return HeadLoad(**counts, bubble=1 - now.looks_filled / now.looks if now.looks else None)

    @asynccontextmanager
    async def generate(self, request: Generation) -> AsyncIterator[AsyncIterator[Sampled]]:
        """Stream one generation through the run that takes requests now: since the request was looked up, this one may
        have been told to drain. Raises Unavailable where none does."""
        run = self.present(self.claim.deployment)
        if run is None:
            raise unavailable(self.id)
        run.streams += 1
        try:
            async with run.pipeline.generate(request) as tokens:
                yield tokens
        except StageError:
            run.doubted.set()
            raise
        finally:
            run.streams -= 1
            run.look()

    def look(self) -> None:
        """Notice when the last stream of a run that drains has ended."""
        if self.draining and not self.streams:
            self.drained.set()


class Heads:
    """The heads of this node, by fence."""

    def __init__(
        self,
        credentials: Callable[[], Credentials],
        seats: HopSeats,
        dial_stage: Callable[[NodeId, bytes], Awaitable[socket.socket]],
        model_of: Callable[[str], ServableModel],
        post: Callable[[Event], Awaitable[None]],
        probes: Probes,
    ) -> None:
        self._credentials = credentials
        self._seats = seats
        self._dial_stage = dial_stage
        self._model_of = model_of
        self._post = post
        self._probes = probes
        self._scopes: dict[Fence, trio.CancelScope] = {}
        self._returns: dict[Fence, trio.MemoryReceiveChannel[socket.socket]] = {}
        self._opened: dict[Fence, ServedRun] = {}
        self.serving: dict[Fence, ServedRun] = {}
        """Those that take requests."""

    def expect(self, claim: Claim, hops: Hops) -> None:
        """Take the last stage's connection, before any stage is told to dial; `close` may follow at once."""
        self._scopes[claim.fence] = trio.CancelScope()
        into, arriving = trio.open_memory_channel[socket.socket](1)
        self._returns[claim.fence] = arriving

        async def take(connection: socket.socket) -> None:
            try:
                into.send_nowait(connection)
            except (trio.WouldBlock, trio.BrokenResourceError):
                connection.close()

        self._seats.open(hops.tokens[-1], take)

    async def open(self, claim: Claim, hops: Hops, created: int) -> None:
        """Connect, probe, serve until the pipeline ends or `close`."""
        try:
            with self._scopes[claim.fence]:
                await self._serve(claim, hops, created)
        except* MeshError as errors:
            error = first_of(errors)
            log.warning("%s: the head ended: %s", claim.fence, error)
            kind = error.reason if isinstance(error, StageError) else StageLost.kind
            await self._post(HeadFailed(claim.fence, str(error), kind))
        finally:
            self._seats.close(hops.tokens[-1])
            self._scopes.pop(claim.fence, None)
            self.serving.pop(claim.fence, None)
            self._opened.pop(claim.fence, None)
            _close_all(self._returns.pop(claim.fence))

    def serve(self, fence: Fence) -> None:
        """Send requests to the head of `fence` from now on, again if it was to drain. One that was lost is reported."""
        run = self._opened.get(fence)
        if run is not None:
            run.draining = False
            self.serving[fence] = run

    def drain(self, fence: Fence) -> None:
        """Send no new request to the head of `fence`; HeadDrained follows when nothing streams through it."""
        run = self.serving.pop(fence, None)
        if run is not None:
            run.draining = True
            run.look()

    def present(self, deployment: str) -> ServedRun | None:
        """The run of `deployment` that takes requests."""
        found = [run for run in self.serving.values() if run.claim.deployment == deployment]
        return max(found, key=lambda run: run.claim.fence, default=None)

    def close(self, fence: Fence) -> None:
        """End the head of `fence`; requests in it get a typed error."""
        self.serving.pop(fence, None)
        run = self._opened.pop(fence, None)
        if run is not None:
            run.pipeline.drain("the run ended")
        scope = self._scopes.get(fence)
        if scope is not None:
            scope.cancel()

    async def _serve(self, claim: Claim, hops: Hops, created: int) -> None:
        model = self._model_of(claim.manifest_digest)
        own = self._head_credentials(hops.names[-1])
        with trio.move_on_after(OPEN_S) as opening:
            first = await self._dial_first(claim, hops, own)
            last = await self._accept_last(claim, hops, own)
            options = ServingOptions(
                stages=len(claim.stages),
                context=claim.options.context,
                vocabulary=len(model.vocabulary.pieces),
                end_tokens=model.vocabulary.end,
                lanes=claim.options.lanes,
                chunk=claim.options.chunk,
                # Of such a model the header says that its lanes cannot be cut; of all others the stages are asked.
                reuse=Reuse.WHOLE if any(layer.state_bytes for layer in model.local.footprint.layers) else Reuse.ANY,
            )
            pipeline = HeadPipeline(options, claim.fence, first, last)
            async with trio.open_nursery() as nursery:
                await nursery.start(pipeline.run)
                pipeline.limit_reuse(await self._probes.ask(pipeline, claim, model.vocabulary))
                opening.deadline = float("inf")
                run = self._opened[claim.fence] = ServedRun(model, pipeline, claim, created, self.present)
                await self._post(HeadOpened(claim.fence))
                nursery.start_soon(self._look_again, run)
                await self._tell_drained(run)
        if opening.cancelled_caught:
            raise StageLost(f"the pipeline did not answer within {OPEN_S:g} s")

    async def _look_again(self, run: ServedRun) -> None:
        """Probe a run again whose stages failed a request; one that fails the probe ends, and is not listed."""
        while True:
            await run.doubted.wait()
            run.doubted = trio.Event()
            try:
                with trio.move_on_after(OPEN_S):
                    await self._probes.ask(run.pipeline, run.claim, run.vocabulary)
            except (
                RequestError
            ) as error:  # no lane free, or too slow: nothing is known, and the next failure asks again
                log.info("%s: not probed: %s", run.claim.fence, error)
            await trio.sleep(DOUBT_S)

    async def _tell_drained(self, run: ServedRun) -> None:
        while True:
            await run.drained.wait()
            run.drained = trio.Event()
            if run.draining:
                await self._post(HeadDrained(run.claim.fence))

    def _head_credentials(self, name: str) -> Credentials:
        node = self._credentials()
        key = Ed25519PrivateKey.generate()
        leaf = make_stage(node.authority, key.public_key(), name, datetime.now(UTC))
        return Credentials(key, (leaf, *node.chain), node.root)

    async def _dial_first(self, claim: Claim, hops: Hops, own: Credentials) -> HeadStream:
        raw = await self._dial_stage(claim.stages[0].node, hops.tokens[0])
        return await _secure(raw, own, hops.names[0], server=False)

    async def _accept_last(self, claim: Claim, hops: Hops, own: Credentials) -> HeadStream:
        arriving = self._returns[claim.fence]
        while True:
            raw = await arriving.receive()
            try:
                return await _secure(raw, own, hops.names[-2], server=True)
            except (PeerError, StageLost) as error:
                log.warning("%s: a connection to the head was refused: %s", claim.fence, error)


async def _secure(raw: socket.socket, own: Credentials, peer_name: str, *, server: bool) -> HeadStream:
    """TLS with exactly `peer_name` at the other end."""
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    context = stage_context(server, own.chain_pem, own.key, own.root_pem)
    return await secure(raw, context, lambda der: check_stage_peer(der, peer_name), server=server)


def _close_all(arriving: trio.MemoryReceiveChannel[socket.socket]) -> None:
    """Nobody takes what still waits."""
    try:
        while True:
            arriving.receive_nowait().close()
    except (trio.WouldBlock, trio.EndOfChannel):
        arriving.close()
