"""The models that this node was asked for: `serve` at the start, `load` and `unload` while it runs, several at once.

    file -> checked, vocabulary opened (a child process) -> hashed -> demanded, once a replica

Invariant: a file or option that no mesh could serve is refused before anything is started or said to others, and the
vocabulary's process lives until no head of this node speaks its model any more.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import msgspec
import trio

from meshnode.app.shelf import ServableModel, Shelf, model_name
from meshnode.core.coordination.demands import encode_demand
from meshnode.core.node.events import Demanded, Event, ModelNotOpened, ModelOpened, Withdrawn
from meshnode.core.node.mediator import Mediator
from meshnode.core.planning.demand import check_demand, resolve_kv_type
from meshnode.errors import ConfigError, MeshError
from meshnode.identity.certificates import Role
from meshnode.identity.ids import NodeId, is_id
from meshnode.io.llama.footprint import footprint_of
from meshnode.io.llama.gguf_file import open_model
from meshnode.io.stage.tokenizer import Tokenizer
from meshnode.wire.demand import Demand, DeploymentId

log = logging.getLogger("meshnode.node")

MODEL_BYTES: Final = 128
"""Of a model's name in UTF-8: it travels in every announcement."""
MODELS: Final = 8
"""Of one node at once: its announcement has room for so many, and each holds a process for its vocabulary."""
PROBLEMS: Final = 8
"""What is remembered of models that could not be loaded."""


@dataclass(frozen=True)
class Wanted:
    """A model and how to serve it; 0 and empty mean "choose for me". Nodes by name, id or the whole id."""

    path: Path
    context: int = 0
    lanes: int = 0
    kv_type: str = ""
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    cuts: tuple[int, ...] = ()
    replicas: int = 1

    def demand(self, author: NodeId, digest: str, name: str) -> Demand:
        """A new one, without nodes."""
        return Demand(
            deployment=DeploymentId(secrets.token_hex(8)),
            version=1,
            author=author,
            manifest_digest=digest,
            model=name,
            context=self.context,
            lanes=self.lanes,
            kv_type=self.kv_type,
            cuts=self.cuts,
        )


class Loop(Protocol):
    """What is needed of the runtime."""

    async def post(self, event: Event) -> None:
        """Hand an event to the mediator."""

    async def changed(self) -> None:
        """Wait until the mediator's state may have changed."""


@dataclass
class _Loaded:
    """A model whose file is open."""

    name: str
    tokenizer: Tokenizer
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    inherited: bool = False
    """Nobody at this node asked for it."""
    servable: ServableModel | None = None
    """None before the file is hashed."""
    deployments: list[DeploymentId] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Its manifest, once it is known."""
        return "" if self.servable is None else self.servable.local.digest


def check_servable(wanted: Wanted) -> None:
    """Refuse a file or options that no mesh could serve. Reads headers. Raises ConfigError, ModelError."""
    path = wanted.path
    if not path.is_file():
        raise ConfigError(f"there is no model file {path}", "give the path of a GGUF file; of several, the first")
    if not path.stem.isprintable() or len(path.stem.encode()) > MODEL_BYTES:
        raise ConfigError(
            f"the model's file name is not printable or longer than {MODEL_BYTES} bytes",
            "Rename the file: its name is what clients ask for.",
        )
    if not 1 <= wanted.replicas <= MODELS:
        raise ConfigError(f"{wanted.replicas} replicas are not possible", f"Choose 1 to {MODELS}.")
    footprint = footprint_of(open_model(path), "", path.stem)
    demand = wanted.demand(NodeId(""), "", path.stem)
    check_demand(demand, footprint)
    resolve_kv_type(demand, footprint)


class Models:
    """All of one node. `speaking` tells the deployments whose heads are here."""

    def __init__(self, mediator: Mediator, loop: Loop, shelf: Shelf, speaking: Callable[[], set[str]]) -> None:
        self._mediator = mediator
        self._loop = loop
        self._shelf = shelf
        self._speaking = speaking
        self._nursery: trio.Nursery | None = None
        self._loaded: list[_Loaded] = []
        self.opening: dict[str, tuple[int, int]] = {}
        """Models that are being read: bytes done and in all."""
        self.created: dict[str, int] = {}
        """Of those, when they were asked for, in Unix seconds."""
        self._failed: list[str] = []
        self._awaited: dict[str, str] = {}

    @property
    def lent(self) -> tuple[str, ...]:
        """Models that nobody at this node asked for, and that it coordinates."""
        return tuple(loaded.name for loaded in self._loaded if loaded.inherited)

    @property
    def problems(self) -> tuple[str, ...]:
        """Why models that were asked for are not there, for people."""
        waits = (f"{model}: waits for a member called {name}" for model, name in self._awaited.items())
        return (*self._failed, *waits)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what `load` opens; cancelled when the node ends."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def servable(self, digest: str) -> ServableModel:
        """What a head of this model needs."""
        found = [loaded for loaded in self._loaded if loaded.digest == digest]
        servable = min(found, key=lambda loaded: loaded.inherited).servable
        assert servable is not None, "it has a digest"
        return servable

    async def serve(self, wanted: Wanted, tokenizer: Tokenizer, before: frozenset[str]) -> frozenset[str]:
        """What the node was started for, checked by the caller, whose `tokenizer` outlives it: its deployments.

        In the place of those of `before`, but for what goes on elsewhere by now. Raises MeshError.
        """
        loaded = _Loaded(model_name(wanted.path), tokenizer)
        self._loaded.append(loaded)
        await self._demand(loaded, wanted)
        now, made = trio.current_time(), frozenset[str](loaded.deployments)
        for old in sorted(before - made):
            if not self._mediator.successor.cared_for(old, now):
                await self._loop.post(Withdrawn(old, int(time.time())))
        return made

    async def load(self, wanted: Wanted) -> str:
        """Serve one more; its name. Returns when the file was found good. Raises ConfigError, ModelError."""
        assert self._nursery is not None, "run() is running"
        await trio.to_thread.run_sync(check_servable, wanted)
        name = model_name(wanted.path)
        if any(loaded.name == name and self._is_asked_for(loaded) for loaded in self._loaded):
            raise ConfigError(f"{name} is served already", "Unload it first; `--replicas N` loads it more than once.")
        if len(self._loaded) >= MODELS:
            raise ConfigError(f"this node serves {MODELS} models already", "Unload one: `meshnode unload NAME`.")
        loaded = _Loaded(name, Tokenizer(self._nursery, wanted.path))
        self._loaded.append(loaded)
        self.opening[loaded.name] = (0, 0)
        try:
            await loaded.tokenizer.start()
        except BaseException:
            self._loaded.remove(loaded)
            self.opening.pop(loaded.name, None)
            await loaded.tokenizer.aclose()
            raise
        self._nursery.start_soon(self._load, loaded, wanted)
        return loaded.name

    async def unload(self, name: str) -> int:
        """Want `name` no more, whoever asked for it; how many pipelines of it there were. ConfigError where there is
        none."""
        if self._mediator.me.role != Role.MEMBER:
            raise ConfigError("this node is a client of the mesh", f"Run `meshnode unload {name}` on a member.")
        found = [each for each in self._loaded if each.name == name and self._is_asked_for(each)]
        wanted = [each for each in self._mediator.register.demands.wanted() if each.model == name]
        if not found and not wanted:
            raise ConfigError(f"{name!r} is no model of this mesh", "`meshnode status` lists what is served.")
        for loaded in found:
            loaded.scope.cancel()
        # Of what was asked for here the mesh may know nothing more, where others asked for less.
        pipelines = {each.deployment for each in wanted}.union(*(each.deployments for each in found))
        for deployment in sorted(pipelines):
            await self._loop.post(Withdrawn(deployment, int(time.time())))
        return len(pipelines)

    async def open(self, demand: Demand) -> None:
        """Open what a head needs of a model that nobody coordinates; says so, or why not, to the mediator."""
        try:
            loaded = await self._opened(demand)
        except MeshError as error:
            await self._loop.post(ModelNotOpened(demand.deployment, str(error)))
            return
        loaded.deployments.append(demand.deployment)
        assert loaded.servable is not None
        await self._loop.post(ModelOpened(demand.deployment, loaded.servable.local.footprint))

    async def recall(self) -> None:
        """Offer the files of models that are wanted, where this node had them before, and no others."""
        tried: set[str] = set()
        while True:
            wanted = self._mediator.register.demands.wanted()
            tried &= {demand.manifest_digest for demand in wanted}
            for demand in wanted:
                path = None if demand.manifest_digest in tried else self._shelf.remembered(demand.manifest_digest)
                tried.add(demand.manifest_digest)
                if path is not None and demand.manifest_digest not in self._shelf.offered:
                    try:
                        await self._shelf.open(path, lambda done, total: None)
                    except MeshError as error:
                        log.warning("%s is wanted, and its file cannot be used: %s", demand.model, error)
            self._shelf.keep(self._used())
            await self._loop.changed()

    def _used(self) -> set[str]:
        """Manifests of the models that somebody wants, that are loaded here, or that a run on this node is made of."""
        demands, held = self._mediator.register.demands.wanted(), self._mediator.ledger.held.values()
        runs = {run.claim.manifest_digest for run in held}
        return runs | {each.manifest_digest for each in demands} | {loaded.digest for loaded in self._loaded}

    async def _opened(self, demand: Demand) -> _Loaded:
        """The model with its vocabulary, which stays as long as this node coordinates it. Raises MeshError."""
        assert self._nursery is not None, "run() is running"
        for loaded in self._loaded:
            if loaded.digest == demand.manifest_digest and not loaded.scope.cancel_called:
                return loaded
        local = await self._shelf.find(demand.manifest_digest, demand.model)
        loaded = _Loaded(demand.model, Tokenizer(self._nursery, local.path), inherited=True)
        try:
            await loaded.tokenizer.start()
        except BaseException:
            await loaded.tokenizer.aclose()
            raise
        loaded.servable = ServableModel(local, loaded.tokenizer)
        self._loaded.append(loaded)
        self._nursery.start_soon(self._lend, loaded)
        return loaded

    async def _lend(self, loaded: _Loaded) -> None:
        """Keep an inherited model as long as it is needed."""
        await self._loop.changed()
        while self._is_needed(loaded):
            await self._loop.changed()
        self._loaded.remove(loaded)
        await loaded.tokenizer.aclose()

    def _is_needed(self, loaded: _Loaded) -> bool:
        waits, keys = self._mediator.successor.waits, set(loaded.deployments)
        opening = {key for key, wait in waits.items() if wait.opening}
        return not keys.isdisjoint(self._mediator.deployments.keys() | self._speaking() | opening)

    def _is_asked_for(self, loaded: _Loaded) -> bool:
        """Whether somebody at this node wants it, and nobody has unloaded it since."""
        wanted = {demand.deployment for demand in self._mediator.register.demands.wanted()}
        known = [key for key in loaded.deployments if self._mediator.register.demands.find(key) is not None]
        unloaded = bool(known) and wanted.isdisjoint(known)
        return not (loaded.inherited or loaded.scope.cancel_called or unloaded)

    async def _load(self, loaded: _Loaded, wanted: Wanted) -> None:
        try:
            with loaded.scope:
                await self._demand(loaded, wanted)
                while self._is_asked_for(loaded):
                    await self._loop.changed()
        except MeshError as error:  # the node and its other models go on
            log.warning("%s could not be loaded: %s", loaded.name, error)
            self._failed = [*self._failed, f"{loaded.name}: {error}"][-PROBLEMS:]
        while not self._speaking().isdisjoint(loaded.deployments):
            await self._loop.changed()
        self._loaded.remove(loaded)
        await loaded.tokenizer.aclose()

    async def _demand(self, loaded: _Loaded, wanted: Wanted) -> None:
        """Hash the file, then ask the mesh for it, once for every replica."""
        created = self.created[loaded.name] = int(time.time())
        self.opening[loaded.name] = (0, 0)

        def progress(done: int, total: int) -> None:
            self.opening[loaded.name] = (done, total)

        try:
            local = await self._shelf.open(wanted.path, progress)
            loaded.servable = ServableModel(local, loaded.tokenizer)
            self.opening.pop(loaded.name, None)
            only, exclude = [await self._nodes(loaded, names) for names in (wanted.only, wanted.exclude)]
            for number in range(wanted.replicas):
                demand = wanted.demand(self._mediator.node, local.digest, local.name)
                demand = self._known(_with_nodes(demand, only, exclude), replicas=wanted.replicas > 1) or _with_nodes(
                    demand, only, (*exclude, *await self._taken(loaded, number > 0))
                )
                self._check_room(demand)
                encode_demand(demand)  # what no message holds is refused here
                loaded.deployments.append(demand.deployment)
                await self._loop.post(Demanded(demand, local.footprint, created))
            for old in self._superseded(local.digest):
                await self._loop.post(Withdrawn(old, created))
        finally:
            self.opening.pop(loaded.name, None)
            self.created.pop(loaded.name, None)
            self._awaited.pop(loaded.name, None)

    def _check_room(self, demand: Demand) -> None:
        """Nobody would remember more than the mesh has room for. Raises ConfigError."""
        known = self._mediator.register.demands
        if known.find(demand.deployment) is None and not known.has_room(demand.author):
            raise ConfigError(
                f"this mesh has no room for one more: {len(known.wanted())} are wanted, counting every replica",
                "Unload a model: `meshnode unload NAME`.",
            )

    def _known(self, demand: Demand, *, replicas: bool) -> Demand | None:
        """What was asked for here before a restart, in the same words: it is gone on with, and not asked for twice."""
        taken = {key for loaded in self._loaded if not loaded.inherited for key in loaded.deployments}
        for known in self._mediator.register.demands.wanted():
            own = known.author == demand.author and known.deployment not in taken
            if own and _asks(known, replicas) == _asks(demand, replicas):
                return known
        return None

    def _superseded(self, digest: str) -> list[DeploymentId]:
        """Demands of this node's people of before for the same file, with other options."""
        taken = {key for loaded in self._loaded if not loaded.inherited for key in loaded.deployments}
        wanted, own = self._mediator.register.demands.wanted(), self._mediator.node
        mine = [each for each in wanted if each.author == own and each.manifest_digest == digest]
        return [each.deployment for each in mine if each.deployment not in taken and not each.replicas]

    async def _nodes(self, loaded: _Loaded, names: tuple[str, ...]) -> tuple[NodeId, ...]:
        """The members with these names or ids; waits for a name that nobody has yet."""
        found: list[NodeId] = []
        for name in names:
            while not (those := self._called(name)):
                self._awaited[loaded.name] = name
                await self._loop.changed()
            self._awaited.pop(loaded.name, None)
            found += those
        return tuple(found)

    def _called(self, name: str) -> list[NodeId]:
        if is_id(name):
            return [NodeId(name)]
        known = (self._mediator.node, *self._mediator.roster.entries)
        return [node for node in known if self._mediator.name_of(node) == name]

    async def _taken(self, loaded: _Loaded, wait: bool) -> tuple[NodeId, ...]:
        """The nodes of the replicas before this one, once they are planned: replicas share none."""
        if not wait:
            return ()
        while True:
            heard = all(self._mediator.register.demands.find(each) is not None for each in loaded.deployments)
            plans = [self._mediator.deployments.get(each) for each in loaded.deployments]
            runs = [deployment.run for deployment in plans if deployment is not None]
            if heard and all(runs):
                return tuple({stage.node for run in runs if run is not None for stage in run.claim.stages})
            await self._loop.changed()


def _with_nodes(demand: Demand, only: tuple[NodeId, ...], exclude: tuple[NodeId, ...]) -> Demand:
    return msgspec.structs.replace(demand, pins=only, excludes=tuple(sorted(set(exclude))))


def _asks(demand: Demand, replicas: bool) -> Demand:
    """What makes two demands the same for a person; replicas exclude the nodes of one another."""
    same = msgspec.structs.replace(
        demand, deployment=DeploymentId(""), version=0, author=NodeId(""), created=0, model=""
    )
    return msgspec.structs.replace(same, excludes=()) if replicas else same
