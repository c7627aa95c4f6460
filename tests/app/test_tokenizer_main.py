from __future__ import annotations

from pathlib import Path

import pytest
import trio

from meshnode.core.serving.text import Conversation
from meshnode.io.stage.spawn import ChildProcess
from meshnode.io.stage.tokenizer_protocol import (
    LENGTH_BYTES,
    MESSAGE_BYTES,
    Described,
    Open,
    Refused,
    Render,
    Reply,
    Shutdown,
    Tokenize,
    decode_reply,
    encode,
)
from tests.factory import models

pytestmark = pytest.mark.native

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HELLO = Render(Conversation(({"role": "user", "content": "hi"},)))


async def started(nursery: trio.Nursery) -> ChildProcess:
    return await ChildProcess.start(nursery, "the tokenizer", "meshnode.app.tokenizer_main", {})


async def send(child: ChildProcess, data: bytes) -> None:
    while data:
        data = data[await child.connection.send(data) :]


async def read(child: ChildProcess, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await child.connection.recv(size - len(data))
    return data


async def reply(child: ChildProcess) -> Reply:
    return decode_reply(await read(child, int.from_bytes(await read(child, LENGTH_BYTES))))


async def test_requests_before_a_vocabulary_is_open_are_refused_and_the_process_lives_on() -> None:
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            child = await started(nursery)
            await send(child, encode(Tokenize("a", add_special=True, parse_special=True)) + encode(HELLO))
            assert [await reply(child), await reply(child)] == [Refused("request", "no vocabulary is open")] * 2
            await send(child, encode(Open("/nowhere.gguf")))
            refused = await reply(child)
            assert isinstance(refused, Refused)
            assert refused.kind == "model"
            await send(child, encode(Shutdown()))
            await child.ended.wait()
            assert child.exit_code == 0


@pytest.mark.parametrize(
    "data", [(MESSAGE_BYTES + 1).to_bytes(LENGTH_BYTES), b"\0\0\0\x02\xc1\xc1", b"\0\0\0\x0a\x81\xa2op\xa5never"]
)
async def test_what_is_no_message_ends_the_process(data: bytes) -> None:
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            child = await started(nursery)
            await send(child, data)
            await child.ended.wait()
            assert child.exit_code == 1


async def test_r94_the_process_ends_with_its_parent_even_inside_an_endless_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "CHAT_TEMPLATE", ENDLESS)
    path = models.build(tmp_path / "endless.gguf", layers=1)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            child = await started(nursery)
            await send(child, encode(Open(str(path))))
            assert isinstance(await reply(child), Described)
            await send(child, encode(HELLO))
            child.connection.close()
            await child.ended.wait()
