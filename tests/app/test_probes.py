"""What is remembered of the first good run, and what it does to the ones after it."""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from meshnode.app.bench.rig import RigOptions, open_sliced, slice_model
from meshnode.app.probes import Probes
from meshnode.core.serving.prefixes import Reuse
from meshnode.core.serving.request import Generation, Sampled
from meshnode.core.serving.text import Vocabulary
from meshnode.demo import MODEL
from meshnode.errors import StageError
from tests.core.coordination.claims import claim
from tests.core.serving.test_probe import clear

CLAIM = claim()
VOCABULARY = 1024
"""Of the demonstration model."""
WORDS = Vocabulary(tuple(b"x" for _ in range(100)), {}, frozenset())


class Tokens:
    """As those of a pipeline: nothing to close when nobody reads on."""

    def __init__(self, *answers: Sampled) -> None:
        self._answers = list(answers)

    def __aiter__(self) -> Tokens:
        return self

    async def __anext__(self) -> Sampled:
        if not self._answers:
            raise StopAsyncIteration
        return self._answers.pop(0)


class Run:
    """Gives the same answer to everything, or a second one to what comes in two chunks."""

    def __init__(self, answer: Sampled, second: Sampled | None = None) -> None:
        self._answers = (answer, second or answer)
        self.asked: list[Generation] = []

    @asynccontextmanager
    async def generate(self, request: Generation) -> AsyncIterator[AsyncIterator[Sampled]]:
        self.asked.append(request)
        answer = self._answers[bool(request.chunk)]

        yield Tokens(answer)


def record(cache: Path) -> Path:
    return cache / CLAIM.manifest_digest / "probe-q8_0.json"


async def test_the_first_good_run_is_recorded_beside_the_manifest(tmp_path: Path) -> None:
    run = Run(clear(1, 2, 3, 4, 5, 6))
    await Probes(tmp_path).ask(run, CLAIM, WORDS)
    assert len({request.id for request in run.asked}) == 3
    assert b"[1,2,3,4,5]" in record(tmp_path).read_bytes()
    assert stat.S_ISREG(record(tmp_path).stat().st_mode)
    assert list(record(tmp_path).parent.iterdir()) == [record(tmp_path)], "no part of a file stays"


async def test_a_later_run_that_agrees_passes_and_the_record_stays(tmp_path: Path) -> None:
    await Probes(tmp_path).ask(Run(clear(1, 2, 3, 4, 5)), CLAIM, WORDS)
    before = record(tmp_path).read_bytes()
    await Probes(tmp_path).ask(Run(clear(1, 2, 3, 4, 7, 8)), CLAIM, WORDS)
    assert record(tmp_path).read_bytes() == before


async def test_a_later_run_that_contradicts_it_fails_and_both_are_named(tmp_path: Path) -> None:
    await Probes(tmp_path).ask(Run(clear(1, 2, 3, 4, 5)), CLAIM, WORDS)
    with pytest.raises(StageError, match=r"6, 7, 8, 9, 10, .*1, 2, 3, 4, 5") as refused:
        await Probes(tmp_path).ask(Run(clear(6, 7, 8, 9, 10, 1, 2, 3, 4, 5)), CLAIM, WORDS)
    assert refused.value.reason == "probe_failed"
    assert str(record(tmp_path)) in str(refused.value)


async def test_a_run_that_fails_by_itself_is_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="one chunk"):
        await Probes(tmp_path).ask(Run(clear(1, 2), clear(2, 1)), CLAIM, WORDS)
    assert not record(tmp_path).exists()


@pytest.mark.parametrize(
    "damage",
    [b"", b"{}", b"[1]", b"\xff" * 9000, b'{"asked":[1],"answered":[9,8,7,6,5]}', b'{"asked":[],"answered":[]}'],
)
async def test_a_damaged_record_or_one_of_another_question_is_replaced(tmp_path: Path, damage: bytes) -> None:
    record(tmp_path).parent.mkdir()
    record(tmp_path).write_bytes(damage)
    await Probes(tmp_path).ask(Run(clear(1, 2, 3, 4, 5)), CLAIM, WORDS)
    assert b"[1,2,3,4,5]" in record(tmp_path).read_bytes()


async def test_a_disk_that_takes_nothing_does_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / CLAIM.manifest_digest).write_bytes(b"a file where a folder should be")
    await Probes(tmp_path).ask(Run(clear(1, 2, 3, 4, 5)), CLAIM, WORDS)


async def test_every_question_has_an_id_of_its_own(tmp_path: Path) -> None:
    probes, run = Probes(tmp_path), Run(clear(1, 2, 3, 4, 5))
    await probes.ask(run, CLAIM, WORDS)
    await probes.ask(run, CLAIM, WORDS)
    assert len({request.id for request in run.asked}) == 6


@pytest.mark.native
async def test_real_stages_in_other_cuts_agree_and_one_with_the_wrong_layers_does_not(tmp_path: Path) -> None:
    """Wrong layers are finite, and the same however the prompt is cut: only what was recorded tells."""
    words = Vocabulary((b"x",) * VOCABULARY, {}, frozenset())
    probes = Probes(tmp_path / "cache")
    whole, cut, elsewhere = (RigOptions(cuts=cuts) for cuts in ((5,), (3, 6), (2, 5)))
    folders = [tmp_path / name for name in ("whole", "cut", "elsewhere")]
    sliced = []
    for folder, options in zip(folders, (whole, cut, elsewhere), strict=True):
        folder.mkdir()
        sliced.append(slice_model(MODEL, options, folder))
    for options, right in ((whole, sliced[0]), (cut, sliced[1])):
        async with open_sliced(right, options) as made:
            assert await probes.ask(made.pipeline, CLAIM, words) is Reuse.ANY
    # Layers 2 to 5 where 3 to 6 belong.
    slices = (sliced[1].slices[0], sliced[2].slices[1], sliced[1].slices[2])
    wrong = dataclasses.replace(sliced[1], slices=slices)
    async with open_sliced(wrong, cut) as made:
        with pytest.raises(StageError, match="most likely tokens") as refused:
            await probes.ask(made.pipeline, CLAIM, words)
    assert refused.value.reason == "probe_failed"
