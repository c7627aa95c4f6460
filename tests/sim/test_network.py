from dataclasses import dataclass, field

from meshnode.identity.ids import NodeId
from sim.agenda import Agenda, stream
from sim.network import GIVE_UP_S, OUTGOING, End, Network, Quality, Way

A, B = NodeId("a"), NodeId("b")


@dataclass
class Box:
    """A host that only writes down."""

    node: NodeId
    on: bool = True
    listening: bool = True
    link: End | None = None
    seen: list[object] = field(default_factory=list)

    def accepted(self, end: End) -> None:
        self.link = end

    def dialed(self, end: End) -> None:
        self.link = end

    def dial_failed(self, node: NodeId, reason: str) -> None:
        self.seen.append(("dial failed", reason))

    def arrived(self, end: End, frame: bytes) -> None:
        self.seen.append(frame)

    def ended(self, end: End, reason: str) -> None:
        self.seen.append(("ended", reason))


def network(loss: float = 0.0, jitter: float = 0.0) -> tuple[Network, Box, Box]:
    made = Network(Agenda(), lambda a, b: Way(Quality(0.01, jitter, loss), stream(1, "link", a, b)))
    one, two = Box(A), Box(B)
    made.hosts.update({A: one, B: two})
    return made, one, two


def linked(loss: float = 0.0, jitter: float = 0.0) -> tuple[Network, Box, Box]:
    made, one, two = network(loss, jitter)
    while one.link is None:
        made.dial(A, B)
        made.agenda.run(made.agenda.now + 5.0)
    return made, one, two


def test_loss_and_jitter_delay_messages_and_change_neither_number_nor_order() -> None:
    made, one, two = linked(loss=0.3, jitter=0.05)
    assert one.link is not None
    frames = [bytes([i]) for i in range(40)]
    for frame in frames:
        made.send(one.link, frame)

    made.agenda.run(made.agenda.now + 60.0)

    assert two.seen == frames


def test_a_way_that_stays_blocked_ends_the_stream_for_the_sender_alone() -> None:
    made, one, two = linked()
    assert one.link is not None
    made.block(A, B)
    made.send(one.link, b"lost")

    made.agenda.run(made.agenda.now + GIVE_UP_S + 1)

    assert one.seen == [("ended", "timed out")]
    assert two.seen == []


def test_what_waited_for_a_blocked_way_arrives_in_order_when_it_is_free_again() -> None:
    made, one, two = linked()
    assert one.link is not None
    made.block(A, B)
    for frame in (b"1", b"2", b"3"):
        made.send(one.link, frame)
    made.agenda.run(made.agenda.now + 5.0)
    assert two.seen == []

    made.unblock(A, B)
    made.send(one.link, b"4")
    made.agenda.run(made.agenda.now + 20.0)

    assert two.seen == [b"1", b"2", b"3", b"4"]


def test_what_was_sent_before_a_close_arrives_before_the_end() -> None:
    made, one, two = linked()
    assert one.link is not None
    made.send(one.link, b"last")
    made.close(one.link)

    made.agenda.run(made.agenda.now + 1.0)

    assert two.seen == [b"last", ("ended", "closed")]
    assert made.ends() == []


def test_words_to_a_machine_without_power_end_in_a_time_out() -> None:
    made, one, two = linked()
    assert one.link is not None
    two.on = False
    made.send(one.link, b"anybody?")

    made.agenda.run(made.agenda.now + GIVE_UP_S + 1)

    assert one.seen == [("ended", "timed out")]


def test_words_to_a_socket_that_is_closed_are_answered_by_a_reset() -> None:
    made, one, two = linked()
    assert one.link is not None
    assert two.link is not None
    made.abort(two.link)
    made.send(one.link, b"anybody?")

    made.agenda.run(made.agenda.now + 1.0)

    assert one.seen == [("ended", "reset")]


def test_a_peer_that_reads_too_slowly_is_closed() -> None:
    made, one, _ = linked()
    assert one.link is not None
    made.stall(one.link, 5.0)
    for _ in range(OUTGOING + 1):
        made.send(one.link, b"x")

    assert one.seen == [("ended", "the peer reads too slowly")]


def test_a_dial_of_a_machine_without_power_and_of_a_dead_process_fail_in_their_own_ways() -> None:
    made, one, two = network()
    two.on = False
    made.dial(A, B)
    made.agenda.run(4.9)
    assert one.seen == []
    made.agenda.run(5.1)
    assert one.seen == [("dial failed", "no answer")]

    two.on, two.listening = True, False
    made.dial(A, B)
    made.agenda.run(5.2)
    assert one.seen[1:] == [("dial failed", "refused")]
