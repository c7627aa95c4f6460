"""Child processes and descriptors that are handed over."""

import os
import socket
import sys

import pytest
import trio

from meshnode.errors import ConfigError
from meshnode.io.stage import descriptors
from meshnode.io.stage.spawn import ChildProcess
from tests.io.stage.neighbour import PATIENCE_S


async def test_the_last_words_of_both_outputs_are_in_the_error_and_not_on_the_pair():
    async with trio.open_nursery() as nursery:
        child = await ChildProcess.start(nursery, "a child", "tests.io.stage.noisy_child", {}, ["hello"])
        with trio.fail_after(PATIENCE_S):
            assert await child.connection.recv(100) == b"ready"
            child.connection.shutdown(socket.SHUT_RDWR)
            await child.ended.wait()
        said = str(child.lost())
        assert said.startswith("a child exited with code 7; it said last:\n")
        assert "from native code: hello\na last line without an end" in said
        assert len(said) < 1000


async def test_a_module_that_does_not_exist_is_a_lost_child_not_an_exception():
    async with trio.open_nursery() as nursery:
        child = await ChildProcess.start(nursery, "a child", "meshnode.no_such_module", {})
        with trio.fail_after(PATIENCE_S):
            await child.ended.wait()
        assert "No module named meshnode.no_such_module" in str(child.lost())


async def test_modules_are_not_searched_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "sneaky.py").write_text("raise SystemExit(99)")
    monkeypatch.chdir(tmp_path)
    async with trio.open_nursery() as nursery:
        child = await ChildProcess.start(nursery, "a child", "sneaky", {})
        with trio.fail_after(PATIENCE_S):
            await child.ended.wait()
        assert child.exit_code == 1


def test_a_descriptor_travels_with_the_bytes_and_is_not_inherited_further():
    ours, theirs = socket.socketpair()
    left, right = socket.socketpair()
    with ours, theirs, left, right:
        ours.sendmsg([b"one"], descriptors.ancillary(left.fileno()))
        ours.sendall(b"two")
        data, found = descriptors.receive(theirs, 3)
        assert (data, len(found)) == (b"one", 1)
        assert not os.get_inheritable(found[0])
        with socket.socket(fileno=found[0]) as passed:
            passed.sendall(b"through")
            assert right.recv(100) == b"through"
        assert descriptors.receive(theirs, 3) == (b"two", [])


def test_more_descriptors_than_expected_are_closed():
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull) as extra:
        before = len(os.listdir("/proc/self/fd"))
        many = [socket.SOL_SOCKET, socket.SCM_RIGHTS, b""]
        many[2] = b"".join(extra.fileno().to_bytes(4, sys.byteorder) for _ in range(8))
        ours.sendmsg([b"x"], [tuple(many)])
        assert descriptors.receive(theirs, 1) == (b"x", [])
        assert len(os.listdir("/proc/self/fd")) == before


async def test_a_system_without_descriptor_passing_is_told_so_before_anything_starts(monkeypatch):
    monkeypatch.setattr(descriptors, "available", lambda: False)
    async with trio.open_nursery() as nursery:
        with pytest.raises(ConfigError) as caught:
            await ChildProcess.start(nursery, "a child", "meshnode.no_such_module", {})
    assert caught.value.hint
