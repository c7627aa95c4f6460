"""CONTROL links between two nodes over real TLS."""

from __future__ import annotations

import msgpack
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from meshnode.app.control import CROSSWISE_S, OUTGOING, SEND_S, ControlLinks
from meshnode.core.node.events import Event, LinkClosed, LinkOpened, Received
from meshnode.errors import Barred, LinkLost
from meshnode.identity.chains import PeerIdentity
from meshnode.identity.ids import NodeId
from meshnode.io.transport.stream import Stream
from meshnode.wire.messages import Leave, Ping, Pong, Unknown, decode, encode
from meshnode.wire.preface import StreamClass
from tests.app.members import Member, pair


class Node:
    """A member whose mediator only writes down what it is told."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.events: list[Event] = []
        self.news = trio.Event()
        self.links = ControlLinks(member.transport, member.node, self._post)
        self.accepts = trio.Event()
        self.accepts.set()

    async def listen(self, nursery: trio.Nursery) -> Node:
        await self.member.listen(nursery, self._accepted)
        return self

    async def until(self, event: Event, times: int = 1) -> None:
        while self.events.count(event) < times:
            await self.news.wait()

    async def _accepted(self, stream: Stream) -> None:
        await self.accepts.wait()
        await self.links.accepted(stream)

    async def _post(self, event: Event) -> None:
        await trio.lowlevel.checkpoint()
        self.events.append(event)
        news, self.news = self.news, trio.Event()
        news.set()


class Two:
    """Two nodes that listen; `low` has the lower id."""

    def __init__(self, low: Node, high: Node, nursery: trio.Nursery) -> None:
        self.low, self.high, self.nursery = low, high, nursery

    def dial(self, one: Node, other: Node) -> None:
        self.nursery.start_soon(one.links.dial, other.member.node, other.member.addresses)

    async def linked(self) -> None:
        self.dial(self.low, self.high)
        await self.low.until(LinkOpened(self.high.member.node))
        await self.high.until(LinkOpened(self.low.member.node))


@pytest.fixture
async def two(nursery: trio.Nursery) -> Two:
    low, high = (Node(member) for member in pair())
    return Two(await low.listen(nursery), await high.listen(nursery), nursery)


def closed(node: Node) -> list[str]:
    return [event.reason for event in node.events if isinstance(event, LinkClosed)]


async def test_messages_go_both_ways_in_their_order(two: Two) -> None:
    await two.linked()
    low, high = two.low.member.node, two.high.member.node
    for nonce in range(20):
        two.low.links.send(high, Ping(nonce))
        two.high.links.send(low, Pong(nonce))
    await two.high.until(Received(low, Ping(19)))
    await two.low.until(Received(high, Pong(19)))
    assert two.high.events == [LinkOpened(low), *(Received(low, Ping(nonce)) for nonce in range(20))]


async def test_a_message_without_a_link_is_dropped(two: Two) -> None:
    two.low.links.send(two.high.member.node, Leave())
    two.low.links.close(two.high.member.node, "nothing to close")
    assert two.low.events == []


@pytest.mark.parametrize("first", ["low", "high"])
async def test_of_two_links_dialed_crosswise_the_one_of_the_lower_id_stays(two: Two, first: str) -> None:
    """Both dial before either has accepted; then both accept."""
    low, high = two.low.member.node, two.high.member.node
    two.low.accepts, two.high.accepts = trio.Event(), trio.Event()
    two.dial(two.low, two.high)
    two.dial(two.high, two.low)
    await two.low.until(LinkOpened(high))
    await two.high.until(LinkOpened(low))
    for node in (two.low, two.high) if first == "low" else (two.high, two.low):
        node.accepts.set()
        await wait_all_tasks_blocked()
    for number in range(3):
        two.low.links.send(high, Ping(number))
        two.high.links.send(low, Ping(number))
    await two.high.until(Received(low, Ping(2)))
    await two.low.until(Received(high, Ping(2)))
    assert {link.dialer for node in (two.low, two.high) for link in node.links._links.values()} == {low}
    assert closed(two.low) == closed(two.high) == [], "the end of the other is told to nobody"


async def test_a_peer_that_dials_again_replaces_its_own_link(two: Two) -> None:
    await two.linked()
    low, high = two.low.member.node, two.high.member.node
    two.dial(two.low, two.high)
    await two.high.until(LinkOpened(low), times=2)
    two.low.links.send(high, Ping(1))
    await two.high.until(Received(low, Ping(1)))
    assert closed(two.high) == []


async def test_both_ends_learn_when_a_link_is_closed(two: Two) -> None:
    await two.linked()
    two.low.links.close(two.high.member.node, "no word for too long")
    await two.low.until(LinkClosed(two.high.member.node, "no word for too long"))
    await two.high.until(LinkClosed(two.low.member.node, "the peer closed the connection"))


async def test_a_dial_that_fails_is_told(two: Two) -> None:
    stranger = NodeId("a" * 52)
    await two.low.links.dial(stranger, two.high.member.addresses)
    (event,) = two.low.events
    assert isinstance(event, LinkClosed)
    assert event.peer == stranger
    assert "answers there" in event.reason


async def test_a_peer_that_bars_this_node_is_told_apart_from_one_that_is_away(
    two: Two, caplog: pytest.LogCaptureFixture
) -> None:
    def admit(peer: PeerIdentity) -> None:
        raise Barred("revoked from the mesh")

    two.high.member.transport.admit = admit
    await two.low.links.dial(two.high.member.node, two.high.member.addresses)
    (event,) = two.low.events
    assert isinstance(event, LinkClosed)
    assert event.barred
    assert event.reason == "revoked from the mesh", "as a person reads it in status"
    assert "lets this node in no more: revoked from the mesh" in caplog.text


async def test_a_dial_that_fails_beside_a_link_is_not_told(two: Two) -> None:
    await two.linked()
    before = list(two.low.events)
    await two.low.links.dial(two.high.member.node, ())
    assert two.low.events == before


async def test_a_peer_that_does_not_read_is_closed_when_its_queue_is_full(two: Two) -> None:
    await two.linked()
    low, high = two.low.member.node, two.high.member.node
    for nonce in range(OUTGOING + 2):
        two.low.links.send(high, Ping(nonce))
    await two.low.until(LinkClosed(high, "the peer reads too slowly"))
    assert high not in two.low.links._links
    await two.high.until(LinkClosed(low, "the peer closed the connection"))


async def test_a_frame_that_cannot_be_sent_in_time_closes_the_link(
    two: Two, nursery: trio.Nursery, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's buffers hold megabytes of a peer that does not read: an endless frame stands for them."""
    sending = trio.Event()

    async def stuck(self: Stream, payload: bytes) -> None:
        sending.set()
        await trio.sleep_forever()

    await two.linked()
    monkeypatch.setattr(Stream, "send_frame", stuck)
    two.low.links.send(two.high.member.node, Leave())
    await sending.wait()
    mock_clock.jump(SEND_S)
    await two.low.until(LinkClosed(two.high.member.node, "the peer reads too slowly"))


async def by_hand(two: Two) -> Stream:
    """A link of the low node that a test speaks on itself."""
    stream = await two.low.member.dial(two.high.member, StreamClass.CONTROL)
    await two.high.until(LinkOpened(two.low.member.node))
    return stream


async def test_an_unknown_op_is_answered_and_the_link_stays(two: Two) -> None:
    stream = await by_hand(two)
    await stream.send_frame(msgpack.packb({"op": "gossip"}))
    assert decode(await stream.receive_frame()) == Unknown("gossip")
    await stream.send_frame(encode(Ping(1)))
    await two.high.until(Received(two.low.member.node, Ping(1)))
    await stream.aclose()


async def test_an_unknown_is_handed_on_and_not_answered(two: Two) -> None:
    """Two nodes would tell each other of it for ever."""
    stream = await by_hand(two)
    await stream.send_frame(encode(Unknown("later")))
    await two.high.until(Received(two.low.member.node, Unknown("later")))
    two.high.links.send(two.low.member.node, Ping(7))
    assert decode(await stream.receive_frame()) == Ping(7)
    await stream.aclose()


async def test_a_malformed_message_closes_the_link(two: Two) -> None:
    stream = await by_hand(two)
    await stream.send_frame(b"\xc1")
    while not closed(two.high):
        await two.high.news.wait()
    assert closed(two.high)[0].startswith("malformed control message")
    await stream.aclose()


async def test_draining_sends_what_was_queued_and_takes_no_more(two: Two) -> None:
    await two.linked()
    low, high = two.low.member.node, two.high.member.node
    for nonce in range(50):
        two.low.links.send(high, Ping(nonce))
    two.low.links.send(high, Leave())
    await two.low.links.drain()
    two.low.links.send(high, Ping(999))
    await two.high.until(Received(low, Leave()))
    assert Received(low, Ping(49)) in two.high.events
    assert Received(low, Ping(999)) not in two.high.events


async def test_a_crosswise_link_that_is_not_let_go_of_is_closed(two: Two, mock_clock: MockClock) -> None:
    await two.linked()
    before = list(two.low.events)
    stream = await two.high.member.dial(two.low.member, StreamClass.CONTROL)
    await stream.send_frame(encode(Ping(1)))
    await wait_all_tasks_blocked()
    mock_clock.jump(CROSSWISE_S)
    with pytest.raises(LinkLost):
        await stream.receive_frame()
    await stream.aclose()
    assert two.low.events == before


async def test_the_end_of_a_link_is_told_however_long_the_mediator_is_busy(two: Two, mock_clock: MockClock) -> None:
    await two.linked()
    waiting, room, told = trio.Event(), trio.Event(), two.low.links._post

    async def full(event: Event) -> None:
        waiting.set()
        await room.wait()
        await told(event)

    two.low.links._post = full
    two.low.links.close(two.high.member.node, "over")
    await waiting.wait()
    mock_clock.jump(5)
    await wait_all_tasks_blocked()
    room.set()
    await two.low.until(LinkClosed(two.high.member.node, "over"))


async def test_a_link_that_ends_before_it_could_be_told_of_leaves_nothing(two: Two) -> None:
    waiting = trio.Event()

    async def full(event: Event) -> None:
        if isinstance(event, LinkOpened):
            waiting.set()
            await trio.sleep_forever()

    two.low.links._post = full
    async with trio.open_nursery() as dialing:
        dialing.start_soon(two.low.links.dial, two.high.member.node, two.high.member.addresses)
        await waiting.wait()
        dialing.cancel_scope.cancel()
    assert two.low.links._links == {}
    await two.low.links.drain()
