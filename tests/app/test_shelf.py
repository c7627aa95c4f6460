from __future__ import annotations

import sys
import threading
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from meshnode.app.shelf import READERS, Shelf, model_name
from meshnode.errors import LinkLost, ModelError, PeerError
from meshnode.identity.ids import NodeId
from meshnode.wire.fence import Fence, RunId, Term
from meshnode.wire.messages import Hop, Prepare, RunOptions
from tests.factory.models import build

OPENED: list[tuple[int, str]] = []
"""(thread, file) of every model file that was opened while `WATCHING`."""
WATCHING = threading.Event()


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and WATCHING.is_set() and str(arguments[0]).endswith(".gguf"):
        OPENED.append((threading.get_ident(), str(arguments[0])))


@pytest.fixture
def opened() -> Any:
    if not OPENED:  # an audit hook stays for the life of the process: one is enough
        sys.addaudithook(_heard)
    OPENED.clear()
    WATCHING.set()
    yield OPENED
    WATCHING.clear()


def nowhere(node: NodeId) -> Any:
    raise AssertionError("nothing is fetched here")


async def test_r46_a_hundred_files_are_read_beside_the_event_loop_a_few_at_a_time(
    tmp_path: Path, opened: list[tuple[int, str]]
) -> None:
    source = build(tmp_path / "m.gguf", layers=2)
    for number in range(100):
        (tmp_path / f"m{number}.gguf").write_bytes(source.read_bytes())
    opened.clear()
    shelf = Shelf(tmp_path / "cache", nowhere, NodeId("own"))
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await trio.lowlevel.checkpoint()
            ticks += 1

    async with trio.open_nursery() as ticking:
        ticking.start_soon(tick)
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(shelf.open, tmp_path / f"m{number}.gguf", lambda done, total: None)
        ticking.cancel_scope.cancel()
    shelf.close()
    assert {file for _, file in opened} >= {str(tmp_path / f"m{number}.gguf") for number in range(100)}
    assert threading.get_ident() not in {thread for thread, _ in opened}, "the loop's thread opens no model"
    assert ticks >= 100, "the loop went round between any two files"
    assert READERS <= 2, "more threads that parse hold the loop up (see there)"


def test_a_model_is_called_by_its_file_without_numbers_of_parts() -> None:
    assert model_name(Path("/m/tiny-q8_0.gguf")) == "tiny-q8_0"
    assert model_name(Path("/m/big-00001-of-00003.gguf")) == "big"


class Told:
    """A source that another node would be: the library of a shelf, without a network between."""

    def __init__(self, shelf: Shelf, name: str) -> None:
        self._library, self.label = shelf.library, name
        self.remote = True
        self.given: list[str] = []

    async def manifest(self, digest: str) -> bytes:
        found = self._library.manifest_bytes(digest)
        if found is None:
            raise PeerError(f"{self.label} does not have it")
        return found

    async def fetch(self, digest: str, artifact: str, offset: int, length: int, sink: Any) -> None:
        found = self._library.find(digest, artifact)
        if found is None:
            raise PeerError(f"{self.label} does not have {artifact}")
        self.given.append(artifact)
        await sink(found[1](offset, length))


def order(digest: str, first: int, last: int, *sources: str) -> Prepare:
    hop = Hop(bytes(16), "", NodeId(""))
    named = [NodeId(name) for name in sources]
    options = RunOptions(128, 1, 128, "q8_0", flash_attention=True)
    fence = Fence(Term(1), RunId("0" * 16))
    return Prepare(fence, "d1", digest, named[0], 0, 2, first, last, 4, options, hop, hop, tuple(named[1:]))


async def test_what_a_head_needs_lies_beside_a_slice_and_bytes_come_from_whoever_has_them(tmp_path: Path) -> None:
    nodes: dict[str, Told] = {}
    asked: list[str] = []

    @asynccontextmanager
    async def connect(node: NodeId) -> Any:
        asked.append(node)
        if node == "gone":
            raise LinkLost("it does not answer")
        yield nodes[node]

    path = build(tmp_path / "m.gguf", layers=4)
    shelves = {name: Shelf(tmp_path / name, connect, NodeId(name)) for name in ("file", "first", "last", "new")}
    nodes.update({name: Told(shelf, name) for name, shelf in shelves.items()})
    local = await shelves["file"].open(path, lambda done, total: None)
    assert await shelves["file"].cached() == {local.digest: ((0, 4),)}
    with pytest.raises(ModelError, match="nothing of m lies"):
        await shelves["new"].find(local.digest, "m")

    await shelves["first"].obtain(order(local.digest, 0, 2, "file"), lambda done, total: None)
    await shelves["last"].obtain(order(local.digest, 2, 4, "file"), lambda done, total: None)
    shelves["file"].close()
    asked.clear()
    found = await shelves["first"].find(local.digest, local.name)
    assert (found.footprint, found.manifest) == (local.footprint, local.manifest)
    assert found.path.name == "metadata.gguf"
    assert await shelves["first"].cached() == {local.digest: ((0, 2),)}

    got = await shelves["new"].obtain(order(local.digest, 1, 4, "gone", "first", "last"), lambda done, total: None)
    assert got.slice.is_file()
    assert asked == ["gone", "first", "last"], "each is dialed once"
    assert "layer.1" in nodes["first"].given
    assert {"layer.2", "layer.3", "output"} <= set(nodes["last"].given)


async def test_metadata_that_was_changed_on_disk_makes_no_head(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "cache", nowhere, NodeId("own"))
    local = await shelf.open(build(tmp_path / "m.gguf", layers=4), lambda done, total: None)
    other = Shelf(tmp_path / "other", nowhere, NodeId("own"))
    await other.store.prepare(local.digest, 0, 4, [Told(shelf, "own")])
    path = other.store.directory(local.digest) / "metadata.gguf"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(ModelError, match="was changed"):
        await other.find(local.digest, "m")
    shelf.close()


async def test_where_a_model_lay_is_remembered_as_long_as_it_lies_there(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "cache", nowhere, NodeId("own"))
    path = build(tmp_path / "m.gguf", layers=4)
    local = await shelf.open(path, lambda done, total: None)
    shelf.close()
    again = Shelf(tmp_path / "cache", nowhere, NodeId("own"))
    assert again.remembered(local.digest) == path
    assert again.remembered("0" * 64) is None
    path.unlink()
    assert again.remembered(local.digest) is None


async def test_a_model_that_is_read_again_or_used_no_more_holds_no_descriptor(tmp_path: Path) -> None:
    def held() -> int:
        return sum(str(tmp_path) in opened.path for opened in psutil.Process().open_files())

    one, two = build(tmp_path / "one.gguf", layers=2), build(tmp_path / "two.gguf", layers=3)
    shelf = Shelf(tmp_path / "cache", nowhere, NodeId("own"))
    for _ in range(3):
        first, second = [await shelf.open(path, lambda done, total: None) for path in (one, two)]
    assert held() == 2
    shelf.keep({first.digest})
    assert held() == 1
    assert shelf.offered == {first.digest}
    assert shelf.library.find(first.digest, "layer.1") is not None
    assert shelf.library.find(second.digest, "layer.1") is None
    shelf.close()
    assert held() == 0


async def test_what_was_being_read_when_its_model_was_unloaded_is_an_error_and_no_other_files_bytes(
    tmp_path: Path,
) -> None:
    shelf = Shelf(tmp_path / "cache", nowhere, NodeId("own"))
    model = await shelf.open(build(tmp_path / "one.gguf", layers=2), lambda done, total: None)
    found = shelf.library.find(model.digest, "layer.1")
    assert found is not None
    shelf.keep(())
    with pytest.raises(ModelError, match="unloaded"):
        found[1](0, 1)
