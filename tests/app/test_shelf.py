from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from meshnode.app.shelf import READERS, Shelf, model_name
from meshnode.errors import ModelError
from meshnode.identity.ids import NodeId
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


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted as Linux shows them")
async def test_a_model_that_is_read_again_or_used_no_more_holds_no_descriptor(tmp_path: Path) -> None:
    def held() -> int:
        links = (Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
        return sum(str(tmp_path) in os.readlink(link) for link in links if link.is_symlink())

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
