"""A whole node: data directory, mesh port, mediator, stages, heads, endpoint, wired and run until told to stop.

Start order: what a person can get wrong first (model file, invite, ports), then what others see. Nothing is written
before it is known to be right.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import msgspec
import psutil
import trio

from meshnode import __version__
from meshnode.app.admin import NODE_FILE, RunningNode
from meshnode.app.admin_routes import AdminRoutes
from meshnode.app.authority import NodeAuthority
from meshnode.app.config import Settings
from meshnode.app.control import ControlLinks
from meshnode.app.directory import MeshDirectory
from meshnode.app.former import former_stages_gone
from meshnode.app.heads import Heads
from meshnode.app.hops import HopSeats
from meshnode.app.intent import Intent, Serve
from meshnode.app.issuing import Issuing
from meshnode.app.joining import become_member, dialable
from meshnode.app.lan import Lan, alone, follow, remember
from meshnode.app.measuring import Machine, Measuring
from meshnode.app.member_routes import MemberRoutes
from meshnode.app.model_routes import ModelRoutes
from meshnode.app.models import Models, Wanted, check_servable
from meshnode.app.passing import answer
from meshnode.app.probes import Probes
from meshnode.app.probing import Probing
from meshnode.app.pulse import Pulse
from meshnode.app.renewal import keep_renewed
from meshnode.app.revoking import Revoking
from meshnode.app.runtime import Disk, Runtime, ends_by_bug
from meshnode.app.shelf import Shelf
from meshnode.app.stages import Hosting, Post, Stages
from meshnode.core.node.events import CacheChanged, CertificateRenewed, DrainWanted, PeerFound, Stopping
from meshnode.core.node.mediator import Mediator, Self
from meshnode.core.node.snapshot import status
from meshnode.core.node.status import NodeStatus
from meshnode.core.planning.inventory import offered_bytes
from meshnode.errors import MeshError, PeerError
from meshnode.identity.certificates import Role
from meshnode.identity.credentials import Credentials
from meshnode.identity.ids import NodeId
from meshnode.identity.invite_book import InviteBook
from meshnode.io.artifacts import BulkClient, serve_bulk
from meshnode.io.disk.atomic import write_atomic
from meshnode.io.disk.directory import DataDirectory, Membership
from meshnode.io.http.access import LOOPBACK_HOSTS, Access
from meshnode.io.http.backend import NodeFigures, StageFigures
from meshnode.io.http.endpoint import HttpEndpoint, build_endpoint
from meshnode.io.http.server import listen, serve_http
from meshnode.io.stage.tokenizer import Tokenizer, open_tokenizer
from meshnode.io.transport.addresses import join_address, local_addresses
from meshnode.io.transport.comparison_desk import ComparisonDesk
from meshnode.io.transport.join_desk import JoinDesk, refuse
from meshnode.io.transport.stream import JoinStream, Stream
from meshnode.io.transport.transport import Handlers, Transport
from meshnode.wire.preface import StreamClass

log = logging.getLogger("meshnode.node")

DRAIN_S = 2.5
"""For answers under way: they get a terminal event within this time."""
LEAVE_S = 0.5
"""For the last messages to peers; a node leaves within 5 s."""
FIGURES_S = 2.0
"""For the stages of this node to say what they computed: a microbatch of a slow machine may be under way."""
ANY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104 - compared with, not bound to


async def run_node(settings: Settings, intent: Intent, stop: trio.Event) -> None:
    """Run one node until `stop` is set, then drain and leave.

    Raises ConfigError (ModelError, InviteError) for what the user can mend, LinkLost when an invite's issuer cannot be
    reached. Nothing is left behind but the data directory.
    """
    if not isinstance(intent, Serve):
        await _run_member(settings, intent, None, stop)
        return
    await trio.to_thread.run_sync(check_servable, _wanted(settings, intent.model))
    # What llama.cpp itself cannot read is found here, before a mesh is made for it.
    async with trio.open_nursery() as nursery, open_tokenizer(nursery, intent.model) as tokenizer:
        await _run_member(settings, intent, tokenizer, stop)


async def _run_member(settings: Settings, intent: Intent, tokenizer: Tokenizer | None, stop: trio.Event) -> None:
    data = DataDirectory.open(settings.data)
    try:
        await former_stages_gone(data.stages_lock)
        became = await become_member(settings, data, intent, stop)
        if became is not None:
            await Node(settings, data, became[0], tokenizer).run(intent, became[1], stop)
    finally:
        data.close()


def _wanted(settings: Settings, path: Path) -> Wanted:
    """What `serve` was asked for."""
    return Wanted(
        path,
        context=settings.context,
        lanes=settings.lanes,
        kv_type=settings.kv_type,
        only=settings.only,
        exclude=settings.exclude,
        cuts=settings.cuts,
    )


class Node:
    """The parts of one running node. Made with what is on disk; `run` does everything else."""

    def __init__(
        self, settings: Settings, data: DataDirectory, membership: Membership, tokenizer: Tokenizer | None
    ) -> None:
        """`tokenizer` is that of the model this node serves; it outlives the node."""
        self.settings = settings
        self.tokenizer = tokenizer
        self.data = data
        self.membership = membership
        self.transport = Transport(membership.credentials, lan_only=not settings.wan)
        self.seats = HopSeats()
        self.pulse = Pulse()
        self.mesh_port = 0
        self.api_url = ""
        self.desk: JoinDesk | None = None
        self._lan_again = trio.CancelScope()
        self._ready = trio.Event()
        self._drained = trio.Event()

    async def run(self, intent: Intent, found: list[PeerFound], stop: trio.Event) -> None:
        """Serve until `stop`, then leave."""
        settings = self.settings
        listener = listen(settings.api_host, settings.api_port)
        self.desk = self._desk()
        http_stop = trio.Event()
        async with trio.open_nursery() as nursery:
            try:
                handlers = self._handlers()
                host = None if settings.listen in ANY_ADDRESS else settings.listen
                self.mesh_port = await nursery.start(self.transport.serve, host, settings.port, handlers)
                self._assemble()
            except BaseException:
                listener.close()
                raise
            nursery.start_soon(self.runtime.run)
            nursery.start_soon(self.pulse.run)
            await nursery.start(self.models.run)
            endpoint = self._endpoint(stop)
            self._endpoint_for_peers = endpoint
            port = await nursery.start(self._serve_http, endpoint, listener, http_stop)
            self.api_url = f"http://{join_address(settings.api_host, port)}"
            self._ready.set()
            nursery.start_soon(remember, self._members_at, self.data.store_peers, self.runtime.changed)
            nursery.start_soon(self._tell_cache)
            nursery.start_soon(self.models.recall)
            nursery.start_soon(follow, self._addresses, self.runtime.post)
            if settings.mdns:
                nursery.start_soon(self._tell_lan)
            nursery.start_soon(self.revoking.watch, self.stages.bar)
            if settings.measure and self.mediator.me.role == Role.MEMBER:
                nursery.start_soon(self.measuring.run, self.runtime.post)
            renewal = partial(keep_renewed, revoked=self.revoking.revoked)
            nursery.start_soon(renewal, self.data, self._held, self._peer_addresses, self._use)
            running = RunningNode(os.getpid(), self.mesh_port, port, self.api_url)
            node_file = self.data.path / NODE_FILE
            write_atomic(node_file, msgspec.json.encode(running))
            try:
                for peer in found:
                    await self.runtime.post(peer)
                if isinstance(intent, Serve):
                    assert self.tokenizer is not None, "a node that serves was given one"
                    nursery.start_soon(self._serve, _wanted(settings, intent.model), self.tokenizer)
                await stop.wait()
            finally:
                node_file.unlink(missing_ok=True)
            await self._leave(http_stop)
            nursery.cancel_scope.cancel()
        self.shelf.close()

    def status(self) -> NodeStatus:
        """The frozen snapshot."""
        issuer = self.membership.issuer is not None
        frozen = status(self.mediator, trio.current_time(), api_url=self.api_url, issuer=issuer)
        counters = {
            **frozen.counters,
            **{f"transport_{name}": value for name, value in self.transport.statistics().items()},
            "fetched_bytes": self.shelf.fetched_bytes,
            "unknown_hop_tokens": self.seats.unknown,
            "loop_lag_worst_ms": self.pulse.worst_ms,
            "loop_lag_usual_ms": self.pulse.usual_ms,
        }
        stages = self.stages.pids()
        return msgspec.structs.replace(
            frozen,
            opening=dict(self.models.opening),
            problems=self.models.problems,
            unhealthy=tuple(filter(None, (self.pulse.sick, self.runtime.sick))),
            stages=stages,
            heads={fence.run: run.load() for fence, run in self.heads.serving.items()},
            loads=self.measuring.loads,
            counters=counters,
            warnings=(*frozen.warnings, *self.issuing.warnings(), *self._alone()),
        )

    # --- wiring -----------------------------------------------------------------------------------------------

    def _assemble(self) -> None:
        """Everything that needs the mesh port's number."""
        settings = self.settings
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        me = Self(
            name=settings.name,
            role=self._own().role.value,
            addresses=self._addresses(),
            memory_usable=offered_bytes(psutil.virtual_memory().available, settings.memory or None),
            incarnation=self.data.next_incarnation(),
            cores=cores,
            startup_timeout_s=float(settings.startup_timeout),
            software=__version__,
            llama=version("llama-cpp-python"),
        )
        authority = NodeAuthority(self._own, lambda: datetime.now(UTC))
        self.mediator = Mediator(me, authority, secrets.token_bytes, trio.current_time())
        ledger = self.data.ledger()
        if ledger is not None:
            self.mediator.ledger.restore(ledger)
        revocations = self.data.revocations()
        if revocations is not None:
            self.mediator.membership.restore(revocations)
        demands = self.data.demands()
        if demands is not None:
            self.mediator.register.restore(demands, int(datetime.now(UTC).timestamp()))
        disk = Disk(self.data.store_ledger, self.data.store_revocations, self.data.store_demands)
        self.runtime = Runtime(self.mediator, disk)
        self.shelf = Shelf(self.data.cache, self._open_bulk, self.mediator.node)
        self.links = ControlLinks(self.transport, self.mediator.node, self.runtime.post)
        post = Post(self.runtime.post, self.runtime.hint)
        threads = settings.threads or cores
        hosting = Hosting(threads, self.data.stages_lock)
        self.stages = Stages(self._own, self.seats, self._dial_stage, self.shelf, post, hosting)
        self.models = Models(self.mediator, self.runtime, self.shelf, self._speaking)
        probes = Probes(self.data.cache)
        self.heads = Heads(self._own, self.seats, self._dial_stage, self.models.servable, self.runtime.post, probes)
        self.runtime.attach(self.links, self.stages, self.heads, self.models)
        self.directory = MeshDirectory(self.mediator, self.heads, self.transport, self.models.created)
        self.probing = Probing(self.mediator, self.transport, trio.current_time)
        machine = Machine(threads, me.memory_usable, self.data.path)
        self.measuring = Measuring(self.mediator, machine, self.probing, self.stages)
        self.revoking = Revoking(self.mediator, self.runtime.post, self.runtime.changed, lambda: self.membership.issuer)
        self.transport.admit = self.revoking.admit
        if self.desk is not None:
            self._guard(self.desk)
        self.issuing = Issuing(self.data, self.mediator, self.transport, self.revoking, self._held, self._use)

    def _held(self) -> Membership:
        return self.membership

    def _speaking(self) -> set[str]:
        """Deployments whose heads are here."""
        return {run.claim.deployment for run in self.heads.serving.values()}

    def _own(self) -> Credentials:
        """As they are now: certificates are renewed daily."""
        return self.membership.credentials

    def _use(self, membership: Membership) -> None:
        """Certificates that were renewed, or this node's appointment as an issuer."""
        self.membership = membership
        self.transport.renew(membership.credentials)
        self.runtime.hint(CertificateRenewed())
        if self.desk is not None and membership.issuer is not None:
            self.desk.renew(membership.credentials, membership.issuer)
        elif self.desk is None:
            self.desk = self._desk()
            if self.desk is not None:
                self._guard(self.desk)
                self._lan_again.cancel()

    def _addresses(self) -> tuple[str, ...]:
        settings = self.settings
        if settings.advertise:
            return settings.advertise
        if settings.listen in ANY_ADDRESS:
            return local_addresses(self.mesh_port, wan=settings.wan)
        return (join_address(settings.listen, self.mesh_port),)

    def _alone(self) -> tuple[str, ...]:
        meant = self.settings.listen not in ANY_ADDRESS
        return () if meant else alone(self.mediator.me.addresses, wan=self.settings.wan)

    async def _tell_lan(self) -> None:
        """mDNS, begun anew when this node becomes an issuer: its hint says whether it admits."""
        while True:
            with trio.CancelScope() as self._lan_again:
                await self._lan().run(self.settings.mdns_interfaces)

    def _lan(self) -> Lan:
        identity = self._own().mesh_id, self.mediator.node
        remembered = frozenset(self.data.peers())

        def members() -> frozenset[NodeId]:
            return remembered | self.mediator.roster.entries.keys()

        def addresses() -> tuple[str, ...]:
            return self.mediator.me.addresses

        post, changed = self.runtime.post, self.runtime.changed
        return Lan(identity, self.desk is not None, addresses, members, post, changed)

    def _desk(self) -> JoinDesk | None:
        issuer = self.membership.issuer
        if issuer is None:
            return None

        async def persist(book: InviteBook) -> None:
            await trio.to_thread.run_sync(self.data.store_invites, book)

        desk = JoinDesk(self._own(), issuer, self.data.invites(), persist, lambda: datetime.now(UTC))
        desk.comparisons = ComparisonDesk() if self.settings.mdns else None
        return desk

    def _guard(self, desk: JoinDesk) -> None:
        desk.barred = self.revoking.barred
        desk.revoked = self.revoking.revoked

    def _endpoint(self, stop: trio.Event) -> HttpEndpoint:
        routes = AdminRoutes(self.mediator, lambda: self.desk, self._status_when_done, stop.set)
        members = MemberRoutes(self.revoking, self.issuing, self.probing)
        settings = self.settings
        access = Access(
            hosts=LOOPBACK_HOSTS | {settings.api_host},
            # Beyond this machine people give it names of their own; there a key protects it.
            any_host=settings.insecure or (bool(settings.api_key) and not settings.api_is_local),
            keys=frozenset(settings.api_key),
            requests_per_key=settings.requests_per_key,
            origins=frozenset(settings.cors_origins),
        )
        token = self.data.api_token()
        models = ModelRoutes(self.mediator, self.models, self.runtime.post)
        every = [*routes.routes(token), *members.routes(token), *models.routes(token)]
        return build_endpoint(self.directory, every, access, self._figures)

    async def _status_when_done(self) -> NodeStatus:
        await self.runtime.executed()
        return self.status()

    async def _figures(self) -> NodeFigures:
        """For `/metrics`. A stage that does not answer at once is left out: nobody waits for a figure."""
        found = []
        with trio.move_on_after(FIGURES_S):
            for order, _, counted in await self.stages.statistics():
                told = {name: getattr(counted, name) for name in StageFigures.__struct_fields__[2:]}
                found.append(StageFigures(order.deployment[:8], order.stage, **told))
        return NodeFigures(tuple(found), self.status().counters)

    # --- connections ------------------------------------------------------------------------------------------

    def _handlers(self) -> Handlers:
        """A bug that a stranger or a member finds ends their connection, not the node."""

        async def member(stream: Stream) -> None:
            await ends_by_bug(self._member, stream)

        async def join(stream: JoinStream) -> None:
            if self.desk is None:  # it may become an issuer while it runs
                await refuse(stream)
            else:
                await ends_by_bug(self.desk.handle, stream)

        async def stage(token: bytes, connection: socket.socket) -> None:
            if await ends_by_bug(self.seats.arrived, token, connection):
                connection.close()

        return Handlers(member, join, stage)

    async def _member(self, stream: Stream) -> None:
        """An authenticated stream that a peer opened."""
        await self._ready.wait()
        await self.revoking.guard(stream, self._serve_peer)

    async def _serve_peer(self, stream: Stream) -> None:
        match stream.stream_class:
            case StreamClass.CONTROL:
                await self.links.accepted(stream)
            case StreamClass.BULK:
                if stream.peer.role.value != "member":
                    raise PeerError("only members get artifacts")
                await serve_bulk(stream, self.shelf.library)
            case StreamClass.REQUEST:
                await answer(stream, self._endpoint_for_peers.passed, self.directory.loads)
            case StreamClass.ISSUER:
                await self.issuing.serve(stream)
            case _:
                raise PeerError("a member stream of a class that carries nothing")

    @asynccontextmanager
    async def _open_bulk(self, node: NodeId) -> AsyncIterator[BulkClient]:
        stream = await self.transport.dial(node, self.mediator.addresses_of(node), StreamClass.BULK)
        try:
            yield BulkClient(stream, self.mediator.name_of(node))
        finally:
            await stream.aclose()

    async def _dial_stage(self, node: NodeId, token: bytes) -> socket.socket:
        """A socket to the stage (or head) behind `token` on `node`, over the first address that answers."""
        addresses = self.mediator.addresses_of(node)
        if node == self.mediator.node:
            # Not as others see it: behind a forwarded port that may not lead back, and networks change.
            host = "127.0.0.1" if self.settings.listen in ANY_ADDRESS else self.settings.listen
            addresses = (join_address(host, self.mesh_port),)
        return await self.transport.dial_stage(addresses, token)

    def _peer_addresses(self) -> list[str]:
        entries = self.mediator.roster.entries.values()
        told = [address for entry in entries if not entry.left for address in entry.body.addresses]
        return dialable(self.settings, told)

    async def _tell_cache(self) -> None:
        """Tell which slices need not be fetched: at the start, and when stages came or went."""
        known: object = None
        told: dict[str, tuple[tuple[int, int], ...]] = {}
        while True:
            present = self.stages.pids(), self.shelf.offered
            if present != known:
                cached = await self.shelf.cached()
                if cached != told:
                    await self.runtime.post(CacheChanged(cached))
                known, told = present, cached
            await self.runtime.changed()

    async def _serve(self, wanted: Wanted, tokenizer: Tokenizer) -> None:
        """What this node was started for, in the place of what it was started for before."""
        made = await self.models.serve(wanted, tokenizer, self.data.asked())
        try:
            await trio.to_thread.run_sync(self.data.store_asked, made)
        except (OSError, MeshError) as error:  # a full disk: another `serve` loads beside this one, no more
            log.warning("what this node was started for could not be kept: %s", error)

    def _members_at(self) -> dict[NodeId, tuple[str, ...]]:
        entries = self.mediator.roster.entries.items()
        return {node: entry.body.addresses for node, entry in entries if not entry.left}

    # --- the end --------------------------------------------------------------------------------------------------

    async def _serve_http(
        self,
        endpoint: HttpEndpoint,
        listener: socket.socket,
        stop: trio.Event,
        task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        try:
            await serve_http(endpoint, listener, stop, task_status)
        finally:
            self._drained.set()

    async def _leave(self, http_stop: trio.Event) -> None:
        """Drain: what others have here moves elsewhere if it can, streams get their terminal event, stages end, peers
        hear that this node leaves."""
        http_stop.set()
        with trio.move_on_after(DRAIN_S):
            await self.runtime.post(DrainWanted(self.mediator.node))
            await self._drained.wait()
            while self.mediator.ledger.holds_for_others:
                await self.runtime.changed()
        await self.runtime.post(Stopping())
        while not self.mediator.stopping:
            await self.runtime.changed()
        with trio.move_on_after(LEAVE_S):
            await self.links.drain()
