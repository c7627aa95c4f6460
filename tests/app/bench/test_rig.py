from __future__ import annotations

import os
import random
import signal
from contextlib import closing, suppress

import llama_cpp
import msgspec
import numpy as np
import pytest
import trio

from meshnode.app.bench.rig import GREEDY, RigOptions, open_rig
from meshnode.app.bench.yardstick import open_yardstick
from meshnode.demo import MODEL
from meshnode.errors import StageLost, Unavailable
from meshnode.wire.messages import RunOptions
from meshnode.wire.sampling import Sampling
from tests import factory

pytestmark = pytest.mark.native

F32 = RunOptions(context=512, lanes=2, chunk=16, kv_type="q8_0", flash_attention=True, wire_dtype="f32")
PROMPT = tuple(5 + number % 256 for number in range(0, 90, 2))
TOKENS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return factory.build(tmp_path_factory.mktemp("rig") / "m.gguf", layers=6, embd=128, heads=4, kv_heads=2)


async def plain_greedy(model, run, prompt=PROMPT, tokens=TOKENS):
    async with open_yardstick(model, run, threads=1) as plain:
        return await plain.greedy(prompt, tokens, run.chunk)


def ids(sampled):
    return [item.token for item in sampled]


@pytest.mark.parametrize("stages", [1, 2, 3])
async def test_greedy_tokens_of_a_split_over_f32_are_those_of_plain_llama_cpp(model, stages) -> None:
    async with open_rig(model, RigOptions(stages=stages, run=F32)) as rig:
        got = ids(await rig.generate(PROMPT, TOKENS))
    assert got == await plain_greedy(model, F32)


async def test_greedy_tokens_of_the_embedded_model_survive_f16_and_uneven_cuts() -> None:
    run = msgspec.structs.replace(F32, wire_dtype="f16", chunk=32)
    async with open_rig(MODEL, RigOptions(cuts=(1, 5), run=run)) as rig:
        got = ids(await rig.generate(PROMPT, TOKENS))
    assert got == await plain_greedy(MODEL, run)


async def test_r17_lanes_that_run_together_over_real_stages_do_not_hear_each_other(model) -> None:
    prompts = [PROMPT[number:] for number in range(4)]
    together = {}

    async with open_rig(model, RigOptions(run=F32)) as rig:
        alone = [ids(await rig.generate(prompt, TOKENS)) for prompt in prompts]

        async def one(number) -> None:
            together[number] = ids(await rig.generate(prompts[number], TOKENS))

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(one, number)
        statistics = rig.pipeline.statistics()
    assert [together[number] for number in range(4)] == alone
    assert statistics.in_flight_most >= 2
    assert statistics.failed == 0


async def test_seeded_sampling_is_repeatable_and_asked_log_probabilities_come_along(model) -> None:
    sampling = Sampling(temperature=0.8, seed=11, top_p=0.9, top_logprobs=3)
    async with open_rig(model, RigOptions(run=F32)) as rig:
        first, second = [await rig.generate(PROMPT, 20, sampling) for _ in range(2)]
    assert first == second
    assert all(len(item.alternatives) == 3 and item.logprob is not None and item.logprob <= 0 for item in first)


def plain_scores(prompt):
    """Of llama-cpp-python's own logits: the log-probability of each token behind the first, and the likeliest ones."""
    options = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
    with closing(llama_cpp.Llama(str(MODEL), **options)) as plain:
        plain.eval(prompt)
        logits = np.asarray(plain.scores[: len(prompt) - 1], np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    likely = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return likely[range(len(prompt) - 1), prompt[1:]], likely.argmax(axis=1)


@pytest.mark.parametrize(
    ("wire_dtype", "kv_type", "tolerance"), [("f32", "f16", 1e-6), ("f16", "q8_0", 0.2)], ids=["exact", "usual"]
)
async def test_a_scored_prompt_is_told_plain_llama_cpps_log_probabilities_at_any_number_of_stages(
    wire_dtype, kv_type, tolerance
) -> None:
    flash = kv_type == "q8_0"
    run = RunOptions(context=512, lanes=2, chunk=128, kv_type=kv_type, flash_attention=flash, wire_dtype=wire_dtype)
    prompt = tuple(PROMPT * 3)
    wanted, best = plain_scores(prompt)
    for stages in (1, 2, 3):
        async with open_rig(MODEL, RigOptions(stages=stages, run=run)) as rig:
            asked = rig.request(prompt, 2, msgspec.structs.replace(GREEDY, top_logprobs=3))
            async with rig.pipeline.generate(msgspec.structs.replace(asked, scored=True)) as stream:
                first, _ = [sampled async for sampled in stream]
            assert ids(await rig.generate(prompt, 1)) == [first.token]
        assert ids(first.prompt) == list(prompt[1:])
        assert [score.logprob for score in first.prompt] == pytest.approx(wanted, abs=tolerance)
        for score, likeliest in zip(first.prompt, best, strict=True):
            top = max(alternative.logprob for alternative in score.alternatives)
            assert top == score.alternatives[0].logprob
            assert (score.logprob == top) is (score.token == score.alternatives[0].token)
            if wire_dtype == "f32":
                assert score.alternatives[0].token == likeliest


async def test_end_tokens_stop_and_ignore_eos_never_draws_them(model) -> None:
    async with open_rig(model, RigOptions(run=F32)) as rig:
        free = ids(await rig.generate(PROMPT, 20))
    end = free[7]
    async with open_rig(model, RigOptions(run=F32, end_tokens=frozenset({end}))) as rig:
        stopped = await rig.generate(PROMPT, 20)
        on = await rig.generate(PROMPT, 20, msgspec.structs.replace(GREEDY, ignore_eos=True))
    assert ids(stopped) == free[: free.index(end) + 1]
    assert stopped[-1].finish == "stop"
    assert len(on) == 20
    assert end not in ids(on)


async def test_r95_a_killed_stage_is_a_typed_error_for_everyone_within_seconds(model) -> None:
    async with open_rig(model, RigOptions(run=F32)) as rig:

        def kill(_: object) -> None:
            # Tokens that were under way may still come when it is gone.
            with suppress(ProcessLookupError):
                os.kill(rig.pids[1], signal.SIGKILL)

        with trio.fail_after(20), pytest.raises(StageLost):
            await rig.generate(PROMPT, 400, on_token=kill)
        with pytest.raises(Unavailable):
            await rig.generate(PROMPT, 1)


async def test_a_prompt_longer_than_free_cells_waits_for_them(model) -> None:
    run = msgspec.structs.replace(F32, context=256)
    order = []

    async with open_rig(model, RigOptions(run=run)) as rig:

        async def one(name, prompt, tokens) -> None:
            order.append((name, len(await rig.generate(prompt, tokens))))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, "first", PROMPT * 3, 100)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(one, "second", PROMPT * 4, 50)
    assert order == [("first", 100), ("second", 50)]


async def test_r26_a_burst_of_cancels_on_real_stages_changes_no_answer(model) -> None:
    draw = random.Random(7)
    prompts = [PROMPT[: draw.randrange(1, 45)] for _ in range(8)]
    got = {}

    async with open_rig(model, RigOptions(stages=3, run=msgspec.structs.replace(F32, lanes=4))) as rig:

        async def one(number) -> None:
            if number % 2:
                with trio.CancelScope() as scope:
                    # Some leave while their prompt is worked off, some while they are answered, some in the queue.
                    await rig.generate(prompts[number], 30, on_token=lambda _: scope.cancel())
            else:
                got[number] = ids(await rig.generate(prompts[number], 15))

        async def gone(number) -> None:
            async with rig.pipeline.generate(rig.request(prompts[number], 30)):
                for _ in range(number):
                    await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(one, number)
                nursery.start_soon(gone, number)
                await trio.lowlevel.checkpoint()
        now = rig.pipeline.statistics()
        alone = {number: ids(await rig.generate(prompts[number], 15)) for number in got}
    assert got == alone
    assert len(got) == 4
    assert (now.lanes_busy, now.queued, now.cells_reserved, now.failed) == (0, 0, 0, 0)


async def asked(rig, prompt, owner):
    """The tokens of one answer, and how many rows of the prompt a lane held."""
    async with rig.pipeline.generate(msgspec.structs.replace(rig.request(prompt, 16), owner=owner)) as stream:
        tokens = [sampled async for sampled in stream]
    return ids(tokens), tokens[0].cached


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("stages", [1, 2, 3])
async def test_what_a_lane_held_changes_no_answer_at_any_number_of_stages(stages, lanes) -> None:
    run = msgspec.structs.replace(F32, lanes=lanes)
    async with open_rig(MODEL, RigOptions(stages=stages, run=run)) as rig:
        said, _ = await asked(rig, PROMPT, None)
        turn = (*PROMPT, *said, 40, 41, 42)
        prompts = [PROMPT, turn, (*PROMPT[:30], 50, 51, 52), turn]
        cold = [await asked(rig, prompt, None) for prompt in prompts]
        warm = [await asked(rig, prompt, "") for prompt in prompts]
        statistics = rig.pipeline.statistics()
        failures = [each.failures for each in await rig.statistics()]
    assert [tokens for tokens, _ in warm] == [tokens for tokens, _ in cold]
    assert [cached for _, cached in cold] == [0] * 4
    # The last token of an answer was never fed; with one lane the third prompt cuts off what the fourth would need.
    held = len(PROMPT) + 15
    assert [cached for _, cached in warm] == [0, held, 30, 30 if lanes == 1 else len(turn) - 1]
    assert statistics.cached_tokens == sum(cached for _, cached in warm)
    assert failures == [0] * stages


@pytest.mark.parametrize("stages", [1, 2])
async def test_recurrent_state_is_continued_and_never_cut(tmp_path, stages) -> None:
    keys = {"attention.head_count_kv": [0, 2, 0, 2]}
    model = factory.build(tmp_path / "m.gguf", "lfm2", layers=4, embd=128, heads=4, kv_heads=2, keys=keys)
    async with open_rig(model, RigOptions(stages=stages, run=F32)) as rig:
        said, _ = await asked(rig, PROMPT, None)
        prompts = [PROMPT, (*PROMPT, *said, 40, 41, 42), (*PROMPT[:30], 50, 51, 52)]
        cold = [await asked(rig, prompt, None) for prompt in prompts]
        # Nobody told this head that the model cannot be cut: the stages do, and the answer is computed from its ids.
        warm = [await asked(rig, prompt, "") for prompt in prompts]
    assert [tokens for tokens, _ in warm] == [tokens for tokens, _ in cold]
    assert [cached for _, cached in warm] == [0, len(PROMPT) + 15, 0]


@pytest.mark.parametrize("stages", [1, 2])
async def test_who_asks_for_repeatable_answers_gets_the_bits_of_a_run_without_reuse(stages) -> None:
    sampling = Sampling(temperature=1.5, seed=11, top_logprobs=3)
    async with open_rig(MODEL, RigOptions(stages=stages, run=F32)) as rig:

        async def drawn(prompt, owner):
            request = rig.request(prompt, 12, sampling)
            asked = msgspec.structs.replace(request, owner=owner, repeatable=True)
            async with rig.pipeline.generate(asked) as stream:
                first, *rest = [sampled async for sampled in stream]
            return [msgspec.structs.replace(first, cached=0), *rest], first.cached

        prompts = [PROMPT, PROMPT, (*PROMPT[:40], 9, 9, 9)]
        cold = [await drawn(prompt, None) for prompt in prompts]
        warm = [await drawn(prompt, "") for prompt in prompts]
    assert [sampled for sampled, _ in warm] == [sampled for sampled, _ in cold]
    assert [cached for _, cached in warm] == [0, 32, 32]
