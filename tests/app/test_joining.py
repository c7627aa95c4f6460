"""How a node comes by its membership, and what it does not dial for it."""

from __future__ import annotations

import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
import trio.testing

from meshnode.app.config import Settings
from meshnode.app.intent import Join, Serve
from meshnode.app.joining import become_member, dialable
from meshnode.errors import ConfigError
from meshnode.identity.invites import Invite, format_invite
from meshnode.io.disk.directory import DataDirectory


def invited_to(*addresses: str) -> Join:
    """An invite in good order of an issuer that is at `addresses`."""
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    return Join(format_invite(Invite(b"m" * 16, b"i" * 16, b"n" * 8, b"s" * 16, expires, addresses)))


def test_only_addresses_of_this_network_are_dialed_unless_the_settings_say_otherwise(tmp_path: Path) -> None:
    told = ["192.168.1.5:1", "8.8.8.8:1", "nas.example:1", "[fd00::5]:1"]
    assert dialable(Settings(data=tmp_path), told) == ["192.168.1.5:1", "[fd00::5]:1"]
    assert dialable(Settings(data=tmp_path, wan=True), told) == told


async def test_an_invite_that_leads_outside_is_refused_with_the_option_that_allows_it(tmp_path: Path) -> None:
    data = DataDirectory.open(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"203\.0\.113\.5:8420") as refused:
        await become_member(Settings(data=data.path), data, invited_to("203.0.113.5:8420"), trio.Event())
    assert "--wan" in refused.value.hint
    data.close()


async def test_who_interrupts_does_not_wait_for_a_silent_issuer(tmp_path: Path) -> None:
    stop, data = trio.Event(), DataDirectory.open(tmp_path / "data")
    became: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        invite = invited_to(f"127.0.0.1:{silent.getsockname()[1]}")

        async def join() -> None:
            became.append(await become_member(Settings(data=data.path), data, invite, stop))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(join)
            taken, _ = await trio.to_thread.run_sync(silent.accept)
            with taken:
                assert await trio.to_thread.run_sync(taken.recv, 1)
                stop.set()
    assert became == [None]
    assert data.membership(datetime.now(UTC)) is None
    data.close()


async def test_a_start_that_nobody_interrupts_has_its_membership(tmp_path: Path) -> None:
    data = DataDirectory.open(tmp_path / "data")
    became = await become_member(Settings(data=data.path), data, Serve(tmp_path / "x.gguf"), trio.Event())
    assert became is not None
    membership, found = became
    assert membership.issuer is not None
    assert found == []
    data.close()
