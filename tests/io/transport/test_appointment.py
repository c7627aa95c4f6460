"""Becoming an issuer over real TLS: what the root signs, and what a member believes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from meshnode.errors import LinkLost, MeshError, PeerError
from meshnode.identity.certificates import Authority, make_issuer, make_node
from meshnode.identity.chains import check_issuer, key_bytes
from meshnode.identity.domains import Domain, sign
from meshnode.identity.ids import id_bytes
from meshnode.identity.keys import spki_of
from meshnode.io.transport.appointment import appoint, be_appointed
from meshnode.io.transport.stream import Stream
from meshnode.wire.join import Appoint, Appointed, Candidate, Installed, decode_join, encode_join
from meshnode.wire.preface import StreamClass
from tests.app.members import Member
from tests.identity.mesh import TestMesh


class Appointing:
    """The root's node dials a member, which answers with `handler`. `order` is what happened."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.mesh = TestMesh()
        self.holder, self.member = Member(self.mesh.node()), Member(self.mesh.node())
        self.key = Ed25519PrivateKey.generate()
        self.order: list[str] = []
        self.kept: list[x509.Certificate] = []

    async def record(self, certificate: x509.Certificate) -> None:
        await trio.lowlevel.checkpoint()
        self.order.append("recorded")

    async def install(self, certificate: x509.Certificate) -> None:
        await trio.lowlevel.checkpoint()
        self.order.append("installed")
        self.kept.append(certificate)

    async def honest(self, stream: Stream) -> None:
        await be_appointed(stream, self.member.credentials, self.key, self.install)

    async def dial(self, handler: Callable[[Stream], Awaitable[None]]) -> Stream:
        await self.member.listen(self.nursery, handler)
        return await self.holder.dial(self.member, StreamClass.ISSUER)

    async def run(
        self, handler: Callable[[Stream], Awaitable[None]], root: Authority | None = None
    ) -> x509.Certificate:
        stream = await self.dial(handler)
        try:
            return await appoint(stream, root or self.mesh.root, self.mesh.now, self.record)
        finally:
            await stream.aclose()


@pytest.fixture
def appointing(nursery: trio.Nursery) -> Appointing:
    return Appointing(nursery)


async def test_a_member_is_made_an_issuer_with_a_key_of_its_own(appointing: Appointing) -> None:
    certificate = await appointing.run(appointing.honest)
    assert appointing.order == ["recorded", "installed"]
    assert appointing.kept == [certificate]
    assert key_bytes(certificate) == spki_of(appointing.key.public_key())
    check_issuer(certificate, appointing.mesh.root.certificate)


async def test_a_key_that_another_node_holds_is_not_certified(appointing: Appointing) -> None:
    """Otherwise revoking the one would be revoking the other."""
    elsewhere = appointing.holder.credentials

    async def borrows(stream: Stream) -> None:
        await stream.receive_frame()
        proof = sign(appointing.key, Domain.ISSUER, elsewhere.mesh_id, id_bytes(elsewhere.node_id))
        await stream.send_frame(encode_join(Candidate(spki_of(appointing.key.public_key()), proof)))
        await stream.receive_frame()

    with pytest.raises(PeerError, match="does not verify"):
        await appointing.run(borrows)
    assert appointing.order == []


async def test_nobody_but_the_root_makes_an_issuer(appointing: Appointing) -> None:
    """A member tries with its own certificate, with an issuer's, and with a root of its own."""
    mesh, member = appointing.mesh, appointing.holder.credentials
    for signer in (member.authority, mesh.issuer, TestMesh().root):
        with pytest.raises(MeshError):
            await appointing.run(appointing.honest, signer)
    assert appointing.kept == []


async def test_an_appointment_of_another_key_or_of_a_mere_node_is_not_kept(appointing: Appointing) -> None:
    mesh = appointing.mesh
    stranger = Ed25519PrivateKey.generate().public_key()
    wrong = [
        make_issuer(mesh.root, stranger, mesh.now),
        make_node(mesh.issuer, appointing.key.public_key(), appointing.member.credentials.role, mesh.now),
    ]
    for certificate in wrong:
        stream = await appointing.dial(appointing.honest)
        await stream.send_frame(encode_join(Appoint()))
        decode_join(await stream.receive_frame(), Candidate)
        await stream.send_frame(encode_join(Appointed(certificate.public_bytes(Encoding.DER))))
        with pytest.raises(LinkLost):
            await stream.receive_frame()
        await stream.aclose()
    assert appointing.kept == []


async def test_nonsense_from_either_end_is_that_ends_fault(appointing: Appointing) -> None:
    async def nonsense(stream: Stream) -> None:
        await stream.receive_frame()
        await stream.send_frame(encode_join(Installed()))

    with pytest.raises(PeerError, match="out of order"):
        await appointing.run(nonsense)
    stream = await appointing.dial(appointing.honest)
    await stream.send_frame(b"\xc1")
    with pytest.raises(LinkLost):
        await stream.receive_frame()
    await stream.aclose()
    assert appointing.kept == []
