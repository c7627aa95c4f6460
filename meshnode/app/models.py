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
from meshnode.core.membership.announcement import Body
from meshnode.core.node.events import Demanded, Event, Withdrawn
from meshnode.core.node.mediator import Mediator
from meshnode.core.planning.demand import check_demand, resolve_kv_type
from meshnode.errors import ConfigError, MeshError
from meshnode.identity.ids import NodeId, is_id
from meshnode.io.llama.footprint import footprint_of
from meshnode.io.llama.gguf_file import open_model
from meshnode.io.stage.tokenizer import Tokenizer
from meshnode.wire.demand import Demand, DeploymentId

log = logging.getLogger("meshnode.node")

MODEL_CHARACTERS: Final = 128
"""Of a model's name: it travels in every announcement."""
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
    servable: ServableModel | None = None
    """None before the file is hashed."""
    deployments: list[DeploymentId] = field(default_factory=list)


def check_servable(wanted: Wanted) -> None:
    """Refuse a file or options that no mesh could serve. Reads headers. Raises ConfigError, ModelError."""
    path = wanted.path
    if not path.is_file():
        raise ConfigError(f"there is no model file {path}", "give the path of a GGUF file; of several, the first")
    if not path.stem.isprintable() or len(path.stem) > MODEL_CHARACTERS:
        raise ConfigError(
            f"the model's file name is not printable or longer than {MODEL_CHARACTERS} characters",
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
        found = (loaded.servable for loaded in self._loaded if loaded.servable is not None)
        return next(servable for servable in found if servable.local.digest == digest)

    async def serve(self, wanted: Wanted, tokenizer: Tokenizer) -> None:
        """What the node was started for, checked by the caller, whose `tokenizer` outlives it. Raises MeshError."""
        loaded = _Loaded(model_name(wanted.path), tokenizer)
        self._loaded.append(loaded)
        await self._demand(loaded, wanted)

    async def load(self, wanted: Wanted) -> str:
        """Serve one more; its name. Returns when the file was found good. Raises ConfigError, ModelError."""
        assert self._nursery is not None, "run() is running"
        await trio.to_thread.run_sync(check_servable, wanted)
        name = model_name(wanted.path)
        if any(loaded.name == name and not loaded.scope.cancel_called for loaded in self._loaded):
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
        """Want `name` no more; how many pipelines of it there were. ConfigError where it is not this node's."""
        found = [each for each in self._loaded if each.name == name and not each.scope.cancel_called]
        if not found:
            elsewhere = [node for node, entry in self._mediator.roster.entries.items() if _serves(entry.body, name)]
            if elsewhere:
                owner = self._mediator.name_of(elsewhere[0])
                raise ConfigError(f"{name} was loaded by {owner}", f"Run `meshnode unload {name}` there.")
            raise ConfigError(f"{name!r} is no model of this node", "`meshnode status` lists what is served.")
        count = 0
        for loaded in found:
            loaded.scope.cancel()
            for deployment in loaded.deployments:
                await self._loop.post(Withdrawn(deployment))
                count += 1
        return count

    async def _load(self, loaded: _Loaded, wanted: Wanted) -> None:
        try:
            with loaded.scope:
                await self._demand(loaded, wanted)
                await trio.sleep_forever()
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
                demand = _with_nodes(demand, only, (*exclude, *await self._taken(loaded, number > 0)))
                loaded.deployments.append(demand.deployment)
                await self._loop.post(Demanded(demand, local.footprint, created))
        finally:
            self.opening.pop(loaded.name, None)
            self.created.pop(loaded.name, None)
            self._awaited.pop(loaded.name, None)

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
            plans = [self._mediator.deployments.get(each) for each in loaded.deployments]
            runs = [deployment.run for deployment in plans if deployment is not None]
            if all(runs):
                return tuple({stage.node for run in runs if run is not None for stage in run.claim.stages})
            await self._loop.changed()


def _with_nodes(demand: Demand, only: tuple[NodeId, ...], exclude: tuple[NodeId, ...]) -> Demand:
    return msgspec.structs.replace(demand, pins=only, excludes=tuple(sorted(set(exclude))))


def _serves(body: Body, name: str) -> bool:
    return any(served.model == name for served in body.served)
