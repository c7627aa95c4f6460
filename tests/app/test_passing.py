"""Requests between two nodes over real TLS; the model behind the head answers by bytes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from meshnode.app.passing import ANSWER_S, ASKED_S, PIECE, SILENT_S, Answering, Asked, answer, ask
from meshnode.errors import LinkLost, PeerError
from meshnode.io.http.backend import PassedRequest
from meshnode.io.http.endpoint import build_endpoint
from meshnode.io.transport.stream import Stream
from meshnode.wire.limits import REQUEST_BODY
from meshnode.wire.preface import StreamClass
from tests.app.members import Member, pair
from tests.io.http.byte_model import ByteDirectory, ByteModel

JSON = (("content-type", "application/json"),)


def request(stream: bool = True, **more: Any) -> PassedRequest:
    body = {"model": "org/byte-model", "prompt": "x", "stream": stream, **more}
    return PassedRequest("POST", "/v1/completions", JSON, json.dumps(body).encode())


class Head:
    """A node that serves the byte model, and one that asks it."""

    def __init__(self) -> None:
        self.model = ByteModel("Hello.")
        self.asker, self.member = pair()
        self.app = build_endpoint(ByteDirectory(self.model)).passed

    async def handle(self, stream: Stream) -> None:
        await answer(stream, self.app)

    async def dial(self) -> Stream:
        return await self.asker.dial(self.member, StreamClass.REQUEST)

    async def lie(self, asked: Asked | bytes, *pieces: bytes) -> Stream:
        """Ask by hand."""
        stream = await self.dial()
        await stream.send_frame(asked if isinstance(asked, bytes) else msgspec.msgpack.encode(asked))
        for piece in pieces:
            await stream.send_frame(piece)
        return stream


@pytest.fixture
async def head(nursery: trio.Nursery) -> Head:
    made = Head()
    await made.member.listen(nursery, made.handle)
    return made


async def test_an_answer_comes_back_as_the_head_gave_it(head: Head) -> None:
    async with ask(await head.dial(), request(stream=False)) as answered:
        text = b"".join([chunk async for chunk in answered.chunks])
    assert (answered.status, dict(answered.headers)["content-type"]) == (200, "application/json")
    assert json.loads(text)["choices"][0]["text"] == "Hello."
    await head.member.ended.wait()
    assert head.member.raised == []


async def test_a_body_longer_than_a_frame_arrives_whole(head: Head) -> None:
    filler = "y" * (3 * PIECE + 7)
    async with ask(await head.dial(), request(stream=False, user=filler)) as answered:
        assert b"Hello." in b"".join([chunk async for chunk in answered.chunks])


async def test_an_asker_that_goes_away_frees_the_lane(head: Head) -> None:
    head.model.stall_at = 2
    async with ask(await head.dial(), request()) as answered:
        assert answered.status == 200
        await head.model.waiting.wait()
        assert head.model.lanes == 1
    await head.model.freed.wait()
    await head.member.ended.wait()
    assert not [error for error in head.member.raised if isinstance(error, BaseExceptionGroup)]


async def test_an_asker_whose_connection_breaks_frees_the_lane(head: Head) -> None:
    head.model.stall_at = 2
    stream = await head.dial()
    asked = request()
    await stream.send_frame(msgspec.msgpack.encode(Asked(asked.method, asked.path, asked.headers, len(asked.body))))
    await stream.send_frame(asked.body)
    await head.model.waiting.wait()
    await trio.aclose_forcefully(stream._tls.transport_stream)
    await head.model.freed.wait()


class Deaf:
    """A stream whose other end has asked, stays silent, and is gone when the answer is sent."""

    def __init__(self, asked: PassedRequest) -> None:
        self.frames = [
            msgspec.msgpack.encode(Asked(asked.method, asked.path, asked.headers, len(asked.body))),
            asked.body,
        ]

    async def receive_frame(self) -> bytes:
        if not self.frames:
            await trio.sleep_forever()
        return self.frames.pop(0)

    async def send_frame(self, payload: bytes) -> None:
        await trio.lowlevel.checkpoint()
        raise LinkLost("the connection broke")


async def test_an_answer_that_cannot_be_sent_is_a_lost_link_and_no_group_of_errors() -> None:
    """The transport counts LinkLost and goes on; a group would end the node."""
    made = Head()
    with pytest.raises(LinkLost):
        await answer(Deaf(request()), made.app)  # what the kernel does in that order only sometimes
    assert made.model.lanes == 0


async def test_a_head_that_goes_away_in_an_answer_is_a_lost_link(head: Head, nursery: trio.Nursery) -> None:
    head.model.stall_at = 2
    seen = trio.Event()

    async def breaking(stream: Stream) -> None:
        async with trio.open_nursery() as both:
            both.start_soon(answer, stream, head.app)
            await seen.wait()
            both.cancel_scope.cancel()

    other = Member(head.member.credentials)
    await other.listen(nursery, breaking)
    async with ask(await head.asker.dial(other, StreamClass.REQUEST), request()) as answered:
        await anext(answered.chunks)
        seen.set()
        with pytest.raises(LinkLost):
            await exhaust(answered.chunks)


async def exhaust(chunks: AsyncIterator[bytes]) -> None:
    async for _ in chunks:
        pass


PLAIN = Asked("POST", "/v1/completions", JSON, 2)
LIES: dict[str, tuple[Asked | bytes, tuple[bytes, ...], str]] = {
    "no message": (b"\xc1", (), "malformed Asked"),
    "a negative body": (Asked("POST", "/", (), -1), (), "malformed Asked"),
    "a body beyond the limit": (Asked("POST", "/", (), REQUEST_BODY + 1), (), "malformed Asked"),
    "a longer body than announced": (PLAIN, (b"{}x",), "another body"),
    "an empty piece": (PLAIN, (b"{", b""), "another body"),
    "a header that is not ASCII": (Asked("POST", "/", (("x", "\u20ac"),), 0), (), "malformed Asked"),
    "a header of two lines": (Asked("POST", "/", (("x", "a\r\ny: b"),), 0), (), "malformed Asked"),
    "a header that ends in a new line": (Asked("POST", "/", (("x", "a\n"),), 0), (), "malformed Asked"),
    "a path that is not ASCII": (Asked("POST", "/\u00fc", (), 0), (), "malformed Asked"),
    "too many headers": (Asked("POST", "/", (("x", "y"),) * 33, 0), (), "malformed Asked"),
}


@pytest.mark.parametrize("lie", LIES)
async def test_an_asker_that_lies_is_refused_and_the_node_lives(head: Head, lie: str) -> None:
    asked, pieces, message = LIES[lie]
    stream = await head.lie(asked, *pieces)
    with pytest.raises(LinkLost):
        await stream.receive_frame()
    await stream.aclose()
    await head.member.ended.wait()
    assert [type(error) for error in head.member.raised] == [PeerError]
    assert message in str(head.member.raised[0])
    assert head.model.seen == []
    async with ask(await head.dial(), request(stream=False)) as answered:
        assert answered.status == 200


async def test_an_asker_that_stalls_is_given_up_in_time(head: Head, mock_clock: MockClock) -> None:
    stream = await head.lie(PLAIN, b"{")
    await wait_all_tasks_blocked()
    mock_clock.jump(ASKED_S)
    await head.member.ended.wait()
    assert [type(error) for error in head.member.raised] == [PeerError]
    await trio.aclose_forcefully(stream._tls.transport_stream)


async def test_headers_that_cannot_travel_are_left_behind(head: Head) -> None:
    odd = PassedRequest("POST", "/v1/completions", (*JSON, ("accept", "\u20ac"), ("x", "y" * 5000)), request().body)
    async with ask(await head.dial(), odd) as answered:
        assert answered.status == 200


@pytest.mark.parametrize("begun", [b"\xc1", msgspec.msgpack.encode({"status": 99_999, "headers": []})])
async def test_a_head_that_lies_is_the_peers_error(head: Head, nursery: trio.Nursery, begun: bytes) -> None:
    async def lying(stream: Stream) -> None:
        await stream.receive_frame()
        await stream.send_frame(begun)
        await trio.sleep_forever()

    other = Member(head.member.credentials)
    await other.listen(nursery, lying)
    with pytest.raises(PeerError, match="malformed Answering"):
        async with ask(await head.asker.dial(other, StreamClass.REQUEST), request()):
            pass


async def test_a_head_that_never_answers_is_given_up(head: Head, nursery: trio.Nursery, mock_clock: MockClock) -> None:
    other, waiting = Member(head.member.credentials), trio.Event()

    async def silent(stream: Stream) -> None:
        while True:
            await stream.receive_frame()
            waiting.set()

    async def asking() -> None:
        with pytest.raises(LinkLost, match="did not answer in time"):
            async with ask(stream, request()):
                pass

    await other.listen(nursery, silent)
    stream = await head.asker.dial(other, StreamClass.REQUEST)
    async with trio.open_nursery() as both:
        both.start_soon(asking)
        await waiting.wait()
        await wait_all_tasks_blocked()
        mock_clock.jump(ANSWER_S)


async def test_a_head_that_stops_in_the_middle_of_its_answer_is_given_up(
    head: Head, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    """A frozen process: its machine keeps the connection alive, and nothing comes."""
    waiting, other = trio.Event(), Member(head.member.credentials)

    async def frozen(stream: Stream) -> None:
        await stream.receive_frame()
        await stream.send_frame(msgspec.msgpack.encode(Answering(200, ())))
        await stream.send_frame(b"data: H\n\n")
        waiting.set()
        await trio.sleep_forever()

    pieces: list[bytes] = []

    async def asking(stream: Stream) -> None:
        with pytest.raises(LinkLost, match="stopped answering"):
            async with ask(stream, request()) as answered:
                pieces.extend([piece async for piece in answered.chunks])

    await other.listen(nursery, frozen)
    stream = await head.asker.dial(other, StreamClass.REQUEST)
    async with trio.open_nursery() as both:
        both.start_soon(asking, stream)
        await waiting.wait()
        await wait_all_tasks_blocked(0.01)
        mock_clock.jump(SILENT_S)


async def test_a_node_that_does_not_take_a_request_is_given_up(
    head: Head, nursery: trio.Nursery, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's buffers hold megabytes of a peer that does not read: an endless frame stands for them."""
    sending = trio.Event()

    async def stuck(self: Stream, payload: bytes) -> None:
        sending.set()
        await trio.sleep_forever()

    async def asking() -> None:
        with pytest.raises(LinkLost, match="did not take the request"):
            async with ask(stream, request()):
                pass

    stream = await head.dial()
    monkeypatch.setattr(Stream, "send_frame", stuck)
    async with trio.open_nursery() as both:
        both.start_soon(asking)
        await sending.wait()
        mock_clock.jump(ASKED_S)


def test_what_begins_an_answer_says_a_status_that_http_has() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Answering(429, ())), type=Answering).status == 429
