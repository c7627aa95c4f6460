"""What a node does with the models it is asked for; the real shelf and a real mediator, no llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from meshnode.app.models import Models, Wanted, check_servable
from meshnode.app.shelf import Shelf
from meshnode.core.coordination import demands
from meshnode.core.node.events import Demanded, Event, ModelNotOpened, ModelOpened, Withdrawn
from meshnode.errors import ConfigError, ModelError
from meshnode.identity.ids import NodeId
from meshnode.io.stage.tokenizer import Tokenizer
from tests.core.node.mesh import World, name_to_id
from tests.factory.models import build

write_model: Any = build
"""Not annotated over there."""


class Loop:
    """The runtime's two methods; `pass_time` is an event that was handled."""

    def __init__(self) -> None:
        self.posted: list[Event] = []
        self._changed = trio.Event()

    async def post(self, event: Event) -> None:
        self.posted.append(event)

    async def changed(self) -> None:
        await self._changed.wait()

    def pass_time(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def nowhere(node: NodeId) -> Any:
    raise AssertionError("nothing is fetched here")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    built: Path = write_model(tmp_path / "tiny.gguf", layers=2)
    return built


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (lambda path: Wanted(path.with_name("missing.gguf")), "no model file"),
        (lambda path: Wanted(path, replicas=0), "replicas"),
        (lambda path: Wanted(path, replicas=9), "replicas"),
        (lambda path: Wanted(path, lanes=-1), "lanes"),
        (lambda path: Wanted(path, context=1 << 30), "context"),
        (lambda path: Wanted(path, kv_type="q9"), "KV type"),
    ],
)
def test_what_no_mesh_could_serve_is_refused(wanted: Callable[[Path], Wanted], words: str, model: Path) -> None:
    check_servable(Wanted(model))
    with pytest.raises(ConfigError, match=words):
        check_servable(wanted(model))


def test_a_file_that_is_no_model_or_has_no_name_to_ask_for_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    with pytest.raises(ModelError, match="junk"):
        check_servable(Wanted(tmp_path / "junk.gguf"))
    unspeakable = tmp_path / "a\nb.gguf"
    unspeakable.write_bytes(model.read_bytes())
    long = tmp_path / ("\u6a21" * 43 + ".gguf")
    long.write_bytes(model.read_bytes())
    for path in (unspeakable, long):
        with pytest.raises(ConfigError, match="printable or longer than 128 bytes"):
            check_servable(Wanted(path))


async def test_a_model_is_demanded_when_the_members_it_names_are_there_and_withdrawn_by_name(
    tmp_path: Path, model: Path, nursery: trio.Nursery
) -> None:
    world, loop = World(), Loop()
    world.add("a", 500)
    world.run(1)
    shelf = Shelf(tmp_path / "cache", nowhere, name_to_id("a"))
    models = Models(world.nodes["a"], loop, shelf, set)
    wanted = Wanted(model, context=128, only=("b",), exclude=("a",))
    nursery.start_soon(models.serve, wanted, Tokenizer(nursery, model), frozenset())
    with trio.fail_after(60):
        while not models.problems:
            await trio.lowlevel.checkpoint()
    assert models.problems == ("tiny: waits for a member called b",)
    assert not models.opening
    loop.pass_time()
    await wait_all_tasks_blocked()
    assert loop.posted == [], "another event is not the member"

    world.add("b", 500)
    world.meet("a", "b")
    world.run(2)
    loop.pass_time()
    await wait_all_tasks_blocked()
    (asked,) = loop.posted
    assert isinstance(asked, Demanded)
    assert (asked.demand.pins, asked.demand.excludes) == ((name_to_id("b"),), (name_to_id("a"),))
    assert (asked.demand.model, asked.demand.context, models.problems) == ("tiny", 128, ())
    assert models.servable(asked.demand.manifest_digest).local.path == model

    world.hand("a", asked)
    with pytest.raises(ConfigError, match="no model of this mesh"):
        await models.unload("other")
    assert await models.unload("tiny") == 1
    (withdrawn,) = loop.posted[1:]
    assert isinstance(withdrawn, Withdrawn)
    assert withdrawn.deployment == asked.demand.deployment
    assert withdrawn.created > 1_700_000_000
    world.hand("a", withdrawn)
    with pytest.raises(ConfigError, match="no model of this mesh"):
        await models.unload("tiny")
    shelf.close()


def hands_on(world: World, loop: Loop) -> None:
    """What was posted reaches the mediator of a."""
    for event in loop.posted:
        world.hand("a", event)
    loop.posted.clear()
    loop.pass_time()


async def asked_for(models: Models, loop: Loop, wanted: Wanted, nursery: trio.Nursery) -> list[Demanded]:
    """What `serve` demands."""
    before = len(loop.posted)
    await models.serve(wanted, Tokenizer(nursery, wanted.path), frozenset())
    return [event for event in loop.posted[before:] if isinstance(event, Demanded)]


async def test_what_was_asked_for_before_a_restart_is_gone_on_with_and_other_options_take_its_place(
    tmp_path: Path, model: Path, nursery: trio.Nursery
) -> None:
    world, loop = World(), Loop()
    world.add("a", 500)
    world.run(1)

    shelves: list[Shelf] = []

    def restarted() -> Models:
        shelves.append(Shelf(tmp_path / "cache", nowhere, name_to_id("a")))
        return Models(world.nodes["a"], loop, shelves[-1], set)

    (first,) = await asked_for(restarted(), loop, Wanted(model, context=128), nursery)
    hands_on(world, loop)
    (again,) = await asked_for(restarted(), loop, Wanted(model, context=128), nursery)
    assert again.demand.deployment == first.demand.deployment
    assert len(loop.posted) == 1
    loop.posted.clear()
    (other,) = await asked_for(restarted(), loop, Wanted(model, context=64), nursery)
    assert other.demand.deployment != first.demand.deployment
    (gone,) = loop.posted[1:]
    assert isinstance(gone, Withdrawn)
    assert gone.deployment == first.demand.deployment
    for shelf in shelves:
        shelf.close()


async def test_a_model_that_the_mesh_has_no_room_for_is_refused_with_what_to_do(
    tmp_path: Path, model: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demands, "WANTED", 2)
    world, loop = World(), Loop()
    world.add("a", 500)
    for deployment in ("d7", "d8"):
        world.serve("a", deployment=deployment)
    shelf = Shelf(tmp_path / "cache", nowhere, name_to_id("a"))
    models = Models(world.nodes["a"], loop, shelf, set)
    with pytest.raises(ConfigError, match="2 are wanted") as error:
        await models.serve(Wanted(model), Tokenizer(nursery, model), frozenset())
    assert "meshnode unload" in error.value.hint
    assert loop.posted == []
    shelf.close()


async def test_a_serve_takes_the_place_of_what_the_node_was_started_for_before(
    tmp_path: Path, model: Path, nursery: trio.Nursery
) -> None:
    world, loop = World(), Loop()
    world.add("a", 500)
    world.serve("a", deployment="d7")
    shelf = Shelf(tmp_path / "cache", nowhere, name_to_id("a"))
    models = Models(world.nodes["a"], loop, shelf, set)
    made = await models.serve(Wanted(model), Tokenizer(nursery, model), frozenset({"d7"}))
    asked, gone = loop.posted
    assert isinstance(asked, Demanded)
    assert made == {asked.demand.deployment}
    assert isinstance(gone, Withdrawn)
    assert gone.deployment == "d7"
    shelf.close()


async def test_a_model_that_another_asked_for_is_opened_from_disk_and_let_go_when_it_is_not_needed(
    tmp_path: Path, model: Path, nursery: trio.Nursery
) -> None:
    world, loop = World(), Loop()
    for name in ("a", "b"):
        world.add(name, 500)
    world.meet("a", "b")
    world.run(2)
    shelf = Shelf(tmp_path / "cache", nowhere, name_to_id("a"))
    local = await shelf.open(model, lambda done, total: None)
    world.serve("b", local.footprint)
    world.run(2)
    (demand,) = world.nodes["a"].register.demands.wanted()
    models = Models(world.nodes["a"], loop, shelf, set)
    await nursery.start(models.run)

    missing = msgspec.structs.replace(demand, manifest_digest="0" * 64)
    await models.open(missing)
    (failed,) = loop.posted
    assert isinstance(failed, ModelNotOpened)
    assert "nothing of" in failed.message

    loop.posted.clear()
    wait = world.nodes["a"].successor.waits[demand.deployment]
    wait.opening = True
    await models.open(demand)
    assert loop.posted == [ModelOpened(demand.deployment, local.footprint)]
    assert models.servable(local.digest).vocabulary.pieces
    loop.pass_time()
    await wait_all_tasks_blocked()
    assert models.servable(local.digest).local.path == model
    wait.opening = False
    with trio.fail_after(30):
        while models.lent:
            loop.pass_time()
            await wait_all_tasks_blocked()
    shelf.close()
