"""What a node does with the models it is asked for; the real shelf and a real mediator, no llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from meshnode.app.models import Models, Wanted, check_servable
from meshnode.app.shelf import Shelf
from meshnode.core.node.events import Demanded, Event, Withdrawn
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
    nursery.start_soon(models.serve, wanted, Tokenizer(nursery, model))
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
