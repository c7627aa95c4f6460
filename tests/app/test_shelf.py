from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from meshnode.app.shelf import READERS, Shelf, model_name
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


async def test_a_model_that_is_loaded_again_and_again_is_open_once(tmp_path: Path) -> None:
    path = build(tmp_path / "m.gguf", layers=2)
    shelf = Shelf(tmp_path / "cache", nowhere, NodeId("own"))
    await shelf.open(path, lambda done, total: None)
    before = psutil.Process().num_fds()
    for _ in range(5):
        await shelf.open(path, lambda done, total: None)
    assert psutil.Process().num_fds() == before
    shelf.close()
