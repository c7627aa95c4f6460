from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
import trio
import trio.lowlevel
import trio.testing

from meshnode.core.serving.text import Conversation
from meshnode.errors import InvalidRequest, ModelError, StageError
from meshnode.io.stage import tokenizer as parent
from meshnode.io.stage.tokenizer import open_tokenizer
from tests.factory import models

pytestmark = pytest.mark.native

HELLO = Conversation(({"role": "user", "content": "hi"},))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build(tmp_path_factory.mktemp("vocabulary") / "tiny.gguf", layers=1)


@contextlib.asynccontextmanager
async def opened(path: Path):
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery, open_tokenizer(nursery, path) as tokenizer:
            yield tokenizer


async def test_text_goes_to_ids_and_back(model: Path) -> None:
    async with opened(model) as tokenizer:
        text = "Hello, wörld ✓ the end"
        ids = await tokenizer.tokenize(text, add_special=True, parse_special=True)
        assert b"".join(map(tokenizer.vocabulary.shown, ids)).decode() == text


async def test_tokens_for_filling_in_are_known_where_the_file_names_them(tmp_path: Path, model: Path) -> None:
    filling = models.build(tmp_path / "filling.gguf", layers=1, fim=(300, 301, 302))
    async with opened(filling) as tokenizer, opened(model) as without:
        assert (tokenizer.vocabulary.fim, tokenizer.vocabulary.fills) == ((300, 301, 302), True)
        assert (without.vocabulary.fim, without.vocabulary.fills) == ((-1, -1, -1), False)


async def test_what_json_can_say_and_a_message_cannot_is_the_clients_fault(model: Path) -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    async with opened(model) as tokenizer:
        for odd in (2**64, -(2**70), deep, "\ud800"):
            with pytest.raises(InvalidRequest):
                await tokenizer.render(Conversation(HELLO.messages, {"odd": odd}))
        assert tokenizer.restarts == 0
        assert await tokenizer.render(HELLO)


async def test_the_vocabulary_says_what_the_file_says(model: Path) -> None:
    async with opened(model) as tokenizer, opened(model) as again:
        vocabulary = tokenizer.vocabulary
        assert (len(vocabulary.pieces), vocabulary.bos, vocabulary.eos, vocabulary.add_bos) == (512, 1, 4, False)
        assert vocabulary.end == {4}
        assert (vocabulary.shown(4), vocabulary.written(4)) == (b"", b"<|end|>")
        assert vocabulary.chat_template == models.CHAT_TEMPLATE
        assert vocabulary.fingerprint == again.vocabulary.fingerprint != ""


async def test_special_tokens_are_parsed_where_asked(model: Path) -> None:
    async with opened(model) as tokenizer:
        assert await tokenizer.tokenize("<|end|>", add_special=False, parse_special=True) == (4,)
        assert len(await tokenizer.tokenize("<|end|>", add_special=False, parse_special=False)) == len("<|end|>")


async def test_a_chat_becomes_the_models_own_prompt(model: Path) -> None:
    async with opened(model) as tokenizer:
        assert await tokenizer.render(HELLO) == "<|user|>hi<|end|><|assistant|>"


async def test_100000_repeated_characters_are_tokenized_or_refused_and_the_next_text_works(model: Path) -> None:
    async with opened(model) as tokenizer:
        with contextlib.suppress(StageError):
            assert len(await tokenizer.tokenize("a" * 100_000, add_special=False, parse_special=True)) == 100_000
        assert len(await tokenizer.tokenize("abc", add_special=False, parse_special=True)) == 3


async def test_a_text_beyond_the_limit_is_refused(model: Path) -> None:
    async with opened(model) as tokenizer:
        with pytest.raises(InvalidRequest, match="bytes"):
            await tokenizer.tokenize("a" * (4 * 2**20 + 1), add_special=False, parse_special=True)
        assert tokenizer.restarts == 0


async def test_text_that_is_no_unicode_is_refused(model: Path) -> None:
    async with opened(model) as tokenizer:
        with pytest.raises(InvalidRequest, match="Unicode"):
            await tokenizer.tokenize("\ud800", add_special=False, parse_special=True)


async def test_a_crash_fails_one_request_and_the_next_finds_a_new_process(model: Path) -> None:
    async with opened(model) as tokenizer:
        child = tokenizer._child
        os.kill(child.pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_expect_stage_error, tokenizer, "tokenizer_crashed")
            await trio.testing.wait_all_tasks_blocked()
            os.kill(child.pid, signal.SIGSEGV)
            os.kill(child.pid, signal.SIGCONT)
        assert len(await tokenizer.tokenize("abc", add_special=False, parse_special=True)) == 3
        assert tokenizer.restarts == 1


async def test_a_process_that_died_between_requests_is_replaced(model: Path) -> None:
    async with opened(model) as tokenizer:
        child = tokenizer._child
        child.kill()
        await child.ended.wait()
        assert await tokenizer.render(HELLO)


async def test_a_stuck_process_fails_one_request(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(model) as tokenizer:
        monkeypatch.setattr(parent, "TOKENIZE_S", 0.05)
        os.kill(tokenizer._child.pid, signal.SIGSTOP)
        await _expect_stage_error(tokenizer, "tokenizer_stuck")
        assert await tokenizer.render(HELLO)


async def test_a_caller_that_leaves_leaves_no_reply_behind_and_the_process_to_the_others(model: Path) -> None:
    async with opened(model) as tokenizer:
        pid = tokenizer._child.pid
        for _ in range(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tokenizer.render, HELLO)
                await trio.lowlevel.checkpoint()  # it has begun
                nursery.cancel_scope.cancel()
            assert await tokenizer.render(HELLO) == "<|user|>hi<|end|><|assistant|>"
        assert (tokenizer._child.pid, tokenizer.restarts) == (pid, 0)


async def test_a_frozen_process_is_replaced_also_when_its_caller_has_left(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent, "TOKENIZE_S", 0.2)
    async with opened(model) as tokenizer:
        os.kill(tokenizer._child.pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_expect_stage_error, tokenizer, "never")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert await tokenizer.render(HELLO) == "<|user|>hi<|end|><|assistant|>"


async def test_grammars_are_checked_in_a_process_of_their_own_that_may_die(model: Path) -> None:
    async with opened(model) as tokenizer:
        pid = tokenizer._child.pid
        assert await tokenizer.check_grammar('start: "yes"') == 'start: "yes"'
        assert 'start: "yes"' in await tokenizer.check_grammar('root ::= "yes"', gbnf=True)
        for wrong in ("start: (", "start: other", "", "\ud800"):
            with pytest.raises(InvalidRequest):
                await tokenizer.check_grammar(wrong)
        checker = tokenizer._checker._child
        os.kill(checker.pid, signal.SIGKILL)
        await checker.ended.wait()
        assert await tokenizer.check_grammar('start: "yes"') == 'start: "yes"', "what was good stays good"
        assert await tokenizer.check_grammar('start: "no"') == 'start: "no"', "and another one is started"
        assert (tokenizer._child.pid, tokenizer.restarts, tokenizer._checker.restarts) == (pid, 0, 1)
        last = tokenizer._checker._child
    assert last.ended.is_set()


async def test_a_check_that_takes_too_long_is_the_grammars_fault_and_delays_no_prompt(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(model) as tokenizer:
        await tokenizer.check_grammar('start: "yes"')
        monkeypatch.setattr(parent, "CHECK_S", 0.2)
        os.kill(tokenizer._checker._child.pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_expect_invalid, tokenizer, 'start: "no"')
            await trio.testing.wait_all_tasks_blocked()
            assert await tokenizer.render(HELLO)
        monkeypatch.undo()
        assert await tokenizer.check_grammar('start: "no"')


async def test_as_many_good_grammars_as_programs_use_are_remembered(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent, "CHECKED", 2)
    async with opened(model) as tokenizer:
        for word in "abca":
            await tokenizer.check_grammar(f'start: "{word}"')
        assert [request.grammar for request in tokenizer._checked] == ['start: "c"', 'start: "a"']


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64, b"no model at all"])
async def test_what_is_no_model_is_a_model_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    async with trio.open_nursery() as nursery:
        with pytest.raises(ModelError, match=r"broken\.gguf"):
            await open_tokenizer(nursery, path).__aenter__()


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set x = 'a' * 10 ** 9 %}{% set y = x * 1000 %}{{ y | length }}",
    ],
    ids=["endless", "greedy"],
)
async def test_a_hostile_template_fails_alone(tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "CHAT_TEMPLATE", template)
    monkeypatch.setattr(parent, "RENDER_S", 2.0)
    path = models.build(tmp_path / "hostile.gguf", layers=1)
    async with opened(path) as tokenizer:
        with pytest.raises(StageError):
            await tokenizer.render(HELLO)
        assert len(await tokenizer.tokenize("abc", add_special=False, parse_special=True)) == 3


async def test_the_process_ends_with_the_block(model: Path) -> None:
    async with opened(model) as tokenizer:
        child = tokenizer._child
    assert child.exit_code == 0


async def _expect_invalid(tokenizer: parent.Tokenizer, grammar: str) -> None:
    with pytest.raises(InvalidRequest):
        await tokenizer.check_grammar(grammar)


async def _expect_stage_error(tokenizer: parent.Tokenizer, reason: str) -> None:
    with pytest.raises(StageError) as failed:
        await tokenizer.tokenize("abc", add_special=False, parse_special=True)
    assert failed.value.reason == reason
    assert "abc" not in str(failed.value)
