"""A certificate that is no good: what both ends are told, over real TLS. Either end may be the one that shows it."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import timedelta

import pytest
import trio
import trio.testing

from meshnode.errors import Barred, MeshError, PeerError
from meshnode.identity.certificates import Authority, make_issuer
from meshnode.identity.chains import PeerIdentity, key_bytes
from meshnode.identity.credentials import Credentials
from meshnode.identity.ids import node_id_of
from meshnode.io.transport.stream import Stream
from meshnode.io.transport.transport import TOLD, Handlers, Transport
from meshnode.wire.preface import StreamClass
from tests.identity.mesh import TestMesh

WEEK = timedelta(days=7)


@pytest.fixture
def mesh() -> TestMesh:
    return TestMesh()


class Ends:
    """One end dials the other; `refused` is what the dialer hears and what the other end's log says then."""

    def __init__(self, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
        self.nursery = nursery
        self.caplog = caplog
        caplog.set_level(logging.WARNING, "meshnode.transport")

    async def refused(self, dialer: Transport, own: Credentials, acceptor: Transport) -> tuple[MeshError, str]:
        heard: list[Stream] = []

        async def member(stream: Stream) -> None:
            heard.append(stream)

        port = await self.nursery.start(acceptor.serve, "127.0.0.1", 0, Handlers(member))
        with pytest.raises(MeshError) as told:
            await dialer.dial(own.node_id, [f"127.0.0.1:{port}"], StreamClass.CONTROL)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert heard == []
        return told.value, self.caplog.text


@pytest.fixture
def ends(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> Ends:
    return Ends(nursery, caplog)


def faulty(kind: str, mesh: TestMesh) -> Credentials:
    """Credentials that others refuse, though their holder trusts the mesh."""
    match kind:
        case "expired":
            return mesh.node(now=mesh.now - 2 * WEEK)
        case "early":
            return mesh.node(now=mesh.now + timedelta(days=2))
        case _:
            return replace(TestMesh(mesh.now).node(), root=mesh.root.certificate)


@pytest.mark.parametrize(
    ("kind", "dialer_hears", "log_says"),
    [
        ("expired", "certificate expired", "certificate has expired"),
        ("early", "compare the clocks of both machines", "not valid yet; compare the clocks of both machines"),
        ("stranger", "the peer belongs to another mesh", "it belongs to another mesh"),
    ],
)
async def test_a_dialer_with_a_bad_certificate_hears_why_and_the_other_end_logs_it(
    mesh: TestMesh, ends: Ends, kind: str, dialer_hears: str, log_says: str
) -> None:
    own = mesh.node()
    told, log = await ends.refused(Transport(faulty(kind, mesh)), own, Transport(own))
    assert isinstance(told, PeerError)
    assert "the peer refuses this node's certificate" in str(told)
    assert dialer_hears in str(told)
    assert "a connection of 127.0.0.1 is refused: the peer's certificate is refused" in log
    assert log_says in log


@pytest.mark.parametrize(
    ("kind", "dialer_says", "log_says"),
    [
        ("expired", "certificate has expired", "certificate expired"),
        ("early", "not valid yet; compare the clocks of both machines", "compare the clocks of both machines"),
        ("stranger", "it belongs to another mesh", "so the peer belongs to another mesh"),
    ],
)
async def test_a_dialer_that_finds_a_bad_certificate_says_why_and_the_other_end_logs_it(
    mesh: TestMesh, ends: Ends, kind: str, dialer_says: str, log_says: str
) -> None:
    own = faulty(kind, mesh)
    told, log = await ends.refused(Transport(mesh.node()), own, Transport(own))
    assert isinstance(told, PeerError)
    assert dialer_says in str(told)
    assert "the peer refuses this node's certificate" in log
    assert log_says in log


def barring(transport: Transport, issuer: str) -> Transport:
    def admit(peer: PeerIdentity) -> None:
        if peer.issuer == issuer:
            raise Barred("revoked from the mesh (the root of the mesh revoked its issuer)")

    transport.admit = admit
    return transport


@pytest.mark.parametrize("dialer_is_out", [True, False])
async def test_who_was_let_in_by_a_revoked_issuer_is_refused_with_the_reason_on_both_ends(
    mesh: TestMesh, ends: Ends, dialer_is_out: bool
) -> None:
    """Judged by the chain that was verified, before anybody introduces himself."""
    other = TestMesh(mesh.now)
    member, out = mesh.node(), _issued_by_another(mesh, other)
    revoked = node_id_of(key_bytes(other.issuer.certificate))
    if dialer_is_out:
        told, log = await ends.refused(Transport(out), member, barring(Transport(member), revoked))
        assert isinstance(told, Barred), "its dialer may rest"
        assert "the peer refused: revoked from the mesh (the root of the mesh revoked its issuer)" in str(told)
    else:
        told, log = await ends.refused(barring(Transport(member), revoked), out, Transport(out))
        assert not isinstance(told, Barred), "nobody bars this node"
        assert "it was revoked from the mesh" in str(told)
    assert "revoked from the mesh (the root of the mesh revoked its issuer)" in log


def _issued_by_another(mesh: TestMesh, other: TestMesh) -> Credentials:
    other.root = mesh.root
    other.issuer = Authority(make_issuer(mesh.root, other.issuer.key.public_key(), mesh.now), other.issuer.key)
    return other.node()


async def test_a_flood_of_refusals_neither_fills_the_log_nor_repeats_itself(
    mesh: TestMesh, caplog: pytest.LogCaptureFixture
) -> None:
    transport = Transport(mesh.node())
    for each in range(2 * TOLD):
        transport._tell(f"10.0.0.{each}", "no good")
        transport._tell(f"10.0.0.{each}", "no good")
    assert len(caplog.records) == TOLD
