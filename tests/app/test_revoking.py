"""Whoever is revoked gets no stream and keeps none, and lists grow one by one."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import cast

import pytest
import trio
import trio.testing

from meshnode.app.authority import NodeAuthority
from meshnode.app.revoking import Revoking
from meshnode.core.node.events import Event, Revoked
from meshnode.core.node.mediator import Mediator, Self
from meshnode.errors import Barred, ConfigError
from meshnode.identity.certificates import Authority
from meshnode.identity.chains import PeerIdentity, key_bytes
from meshnode.identity.ids import NodeId, node_id_of, short
from meshnode.identity.revocation import read_list
from meshnode.io.transport.stream import Stream
from tests.identity.mesh import TestMesh


class Handled:
    """A mediator whose events are handled as soon as they are posted."""

    def __init__(self, *, issuer: bool = True) -> None:
        self.mesh = TestMesh()
        own = self.mesh.node()
        authority = NodeAuthority(lambda: own, lambda: datetime.now(UTC))
        me = Self("one", "member", (), 10**9, 1)
        self.mediator = Mediator(me, authority, os.urandom, 0.0)
        self.records: list[Revoked] = []
        self.issuer = node_id_of(key_bytes(self.mesh.issuer.certificate))
        signer: Authority | None = self.mesh.issuer if issuer else None
        self.revoking = Revoking(self.mediator, self._post, self._wait, lambda: signer)
        self._changed = trio.Event()

    async def _post(self, event: Event) -> None:
        assert isinstance(event, Revoked)
        self.records.append(event)
        self.mediator.handle(event, 1.0)
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def _wait(self) -> None:
        await self._changed.wait()


class OpenStream:
    """Only who is at the other end matters here."""

    def __init__(self, peer: PeerIdentity) -> None:
        self.peer = peer


async def test_an_issuers_lists_grow_and_each_holds_all_before() -> None:
    handled = Handled()
    first, second = handled.mesh.node().node_id, handled.mesh.node().node_id
    await handled.revoking.revoke(first)
    await handled.revoking.revoke(second)
    await handled.revoking.revoke(first)  # known already: no new list
    lists = [
        read_list(event.record.chain, event.record.body, event.record.signature, handled.mesh.root.certificate)
        for event in handled.records
    ]
    assert [told.version for told in lists] == [1, 2]
    assert set(lists[1].nodes) == {first, second}
    assert handled.revoking.barred(first)


async def test_two_revocations_at_once_lose_neither() -> None:
    handled = Handled()
    nodes = [handled.mesh.node().node_id for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(handled.revoking.revoke, node)
    assert all(handled.revoking.barred(node) for node in nodes)


async def test_without_an_issuer_key_for_itself_or_for_no_id_it_is_refused() -> None:
    stranger = Handled().mesh.node().node_id
    with pytest.raises(ConfigError, match="no issuer key"):
        await Handled(issuer=False).revoking.revoke(stranger)
    handled = Handled()
    with pytest.raises(ConfigError, match="does not revoke itself"):
        await handled.revoking.revoke(handled.mediator.node)
    with pytest.raises(ConfigError, match="no node id"):
        await handled.revoking.revoke(type(stranger)("attic"))
    assert handled.records == []


async def test_the_streams_of_a_revoked_node_end_and_no_other() -> None:
    handled = Handled()
    ended: list[str] = []

    def identity() -> PeerIdentity:
        credentials = handled.mesh.node()
        return PeerIdentity(credentials.node_id, credentials.role, b"", credentials.expires)

    victim, other = identity(), identity()

    async def hold(stream: Stream) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(stream.peer.node_id)

    told: list[bool] = []

    async def tell_stages(barred: Callable[[NodeId], bool]) -> None:
        told.append(barred(victim.node_id))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(handled.revoking.watch, tell_stages)
        for peer in (victim, victim, other):
            nursery.start_soon(handled.revoking.guard, cast(Stream, OpenStream(peer)), hold)
        await trio.testing.wait_all_tasks_blocked()
        await handled.revoking.revoke(victim.node_id)
        await trio.testing.wait_all_tasks_blocked()
        assert ended == [victim.node_id, victim.node_id]
        assert told == [True], "the stages hear of it too"
        with pytest.raises(Barred, match=f"revoked from the mesh .issuer {short(handled.issuer)} revoked it"):
            handled.revoking.admit(victim)
        with pytest.raises(Barred):
            await handled.revoking.guard(cast(Stream, OpenStream(victim)), hold)
        handled.revoking.admit(other)
        nursery.cancel_scope.cancel()
