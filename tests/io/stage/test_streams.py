"""Blocking activation streams over real TLS: order, large frames, a slow reader, the end of either side."""

import select
import socket
import threading

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.app.bench.throwaway import ThrowawayMesh
from meshnode.errors import LinkLost, PeerError, StaleFence
from meshnode.io.stage.streams import (
    FrameReader,
    FrameSender,
    authenticate,
    check_fence,
    greet_downstream,
    greet_upstream,
)
from meshnode.io.transport.tls import stage_context
from meshnode.wire.activation import Heartbeat, Kind, Rows, SampledFrame, decode, encode
from meshnode.wire.fence import Fence, Term
from meshnode.wire.rowcodec import Dtype
from tests.io.stage.neighbour import PATIENCE_S, tcp_pair

MESH = ThrowawayMesh.make()
FENCE = MESH.fence


def in_thread(function):
    """Start `function`; the returned call waits for its result."""
    result = []
    thread = threading.Thread(target=lambda: result.append(function()), daemon=True)
    thread.start()

    def wait():
        thread.join(PATIENCE_S)
        assert result, "the thread did not end"
        return result[0]

    return wait


@pytest.fixture
def ends():
    """(dialing, accepting) ends of a TLS connection."""
    key = Ed25519PrivateKey.generate()
    chain = MESH.chain_for(key.public_key(), MESH.head_name)
    dialed, accepted = tcp_pair()
    wait = in_thread(
        lambda: authenticate(accepted, stage_context(True, chain, key, MESH.root_pem), True, lambda _: None)
    )
    client = authenticate(dialed, stage_context(False, chain, key, MESH.root_pem), False, lambda _: None)
    server = wait()
    yield client, server
    client.close()
    server.close()


def rows_of(count, width=1024, microbatch=1):
    values = np.full((count, width), microbatch, np.float32)
    return Rows(FENCE, microbatch, (), range(count), [row % 4 for row in range(count)], [False] * count, None, values)


def anything(_header):
    """Accept every header."""


def test_both_ends_greet_with_the_fence(ends):
    client, server = ends
    wait = in_thread(lambda: greet_upstream(server, FENCE))
    greet_downstream(client, FENCE)
    client.sendall(b"".join(encode(SampledFrame(FENCE, 1, ()))))
    header, _ = wait().read(anything)
    assert header.kind is Kind.SAMPLED


def test_a_greeting_of_another_fence_is_refused_by_the_accepting_end(ends):
    client, server = ends
    client.sendall(b"".join(encode(Heartbeat(Fence(Term(9), FENCE.run)))))
    with pytest.raises(StaleFence):
        greet_upstream(server, FENCE)


def test_a_dialing_end_whose_greeting_is_not_answered_loses_the_link(ends):
    client, server = ends
    server.close()
    with pytest.raises(LinkLost):
        greet_downstream(client, FENCE)


def test_small_and_large_frames_arrive_whole_and_in_order(ends):
    client, server = ends
    sender, reader = FrameSender(client, FENCE), FrameReader(server)
    sizes = [1, 512, 1, 300, 2, 1, 16, 17, 512]

    def send():
        for number, count in enumerate(sizes, start=1):
            frame = rows_of(count, microbatch=number)
            sender.send(number, encode(frame, Dtype.F32))
            frame.activations[:] = -1.0  # the next decode overwrites what was sent

    wait = in_thread(lambda: send() or True)
    for number, count in enumerate(sizes, start=1):
        while True:
            header, body = reader.read(anything)
            if header.kind is Kind.ROWS:
                break
        frame = decode(header, body)
        assert (header.microbatch, frame.activations.shape) == (number, (count, 1024))
        assert (frame.activations == number).all()
    wait()
    sender.close()


def test_a_refused_header_is_refused_before_its_body_arrives(ends):
    client, server = ends
    client.sendall(encode(rows_of(512), Dtype.F32)[0][:48])
    reader = FrameReader(server)
    with pytest.raises(StaleFence):
        reader.read(lambda header: check_fence(header, Fence(Term(9), FENCE.run)))


def test_garbage_is_a_peer_error_and_an_end_a_lost_link(ends):
    client, server = ends
    client.sendall(b"x" * 48)
    reader = FrameReader(server)
    with pytest.raises(PeerError):
        reader.read(anything)
    client.close()
    with pytest.raises(LinkLost):
        FrameReader(server).read(anything)


def test_a_sender_whose_reader_stands_still_blocks_and_ends_when_interrupted(ends):
    client, _ = ends
    sender = FrameSender(client, FENCE)
    sent = []

    def send_for_ever():
        try:
            while True:
                sender.send(len(sent) + 1, encode(rows_of(512), Dtype.F32))
                sent.append(1)
        except LinkLost:
            return True

    wait = in_thread(send_for_ever)
    # The queue is bounded: it fills up, whatever the kernel buffers.
    while len(sender._queue) < 4:
        pass
    sender.interrupt()
    assert wait()
    sender.close()


def test_a_broken_connection_is_told_once_even_to_a_listener_that_comes_late(ends):
    client, server = ends
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    server.close()
    sender = FrameSender(client, FENCE)
    told = threading.Event()
    sender.call_when_broken(told.set)
    assert told.wait(PATIENCE_S)
    again = threading.Event()
    sender.call_when_broken(again.set)
    assert again.is_set()
    with pytest.raises(LinkLost):
        sender.send(1, encode(Heartbeat(FENCE)))
    sender.close()


def test_a_wait_is_ended_from_outside_when_it_is_too_long_and_not_before(ends):
    client, server = ends
    reader, sender = FrameReader(server), FrameSender(client, FENCE)
    reader.expire(-1.0)  # nobody waits: nothing to end
    said, heard = [], threading.Event()

    def read():
        try:
            while True:
                reader.read(anything)
                heard.set()
        except LinkLost as error:
            said.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    reader.expire(PATIENCE_S)
    sender.expire(PATIENCE_S)
    sender.send(1, encode(Heartbeat(FENCE)))
    assert heard.wait(PATIENCE_S)
    # A heartbeat may be on its way at any moment, and what has arrived is no silence: again until one is caught.
    while thread.is_alive():
        reader.expire(-1.0)
    assert said == ["the neighbour has gone silent"]
    sender.close()


def test_what_has_arrived_already_is_no_silence(ends):
    client, server = ends
    reader = FrameReader(server)
    client.sendall(b"".join(encode(Heartbeat(FENCE))))
    # As after a pause of this whole process: it seems to wait since long ago, and the bytes are there.
    while not reader._stream.pending() and not select.select([server], [], [], PATIENCE_S)[0]:
        pass
    reader._waits_since = 0.0
    reader.expire(1.0)
    header, _ = reader.read(anything)
    assert header.kind is Kind.HEARTBEAT


def test_an_interrupted_reader_wakes(ends):
    _, server = ends
    reader = FrameReader(server)

    def read():
        try:
            reader.read(anything)
        except LinkLost:
            return True

    wait = in_thread(read)
    reader.interrupt()
    assert wait()
