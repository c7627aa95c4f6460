"""What OpenSSL makes of our certificates, and what it leaves to our own checks."""

from __future__ import annotations

import socket
import ssl
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from meshnode.errors import PeerError
from meshnode.identity.certificates import head_name, make_stage, stage_name
from meshnode.identity.credentials import Credentials
from meshnode.io.transport.tls import check_stage_peer, member_context, stage_context
from tests.identity.corpus import RUN, Case, corpus
from tests.identity.mesh import TestMesh


def handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends in memory, after the handshake and one read each; `ssl.SSLError` when either refuses."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)
    waiting = list(ends)
    for _ in range(8):
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
    for end in ends:  # a client hears of a refusal on its first read
        with pytest.raises(ssl.SSLWantReadError):
            end.read(1)
    return ends


def shows(case: Case, server: bool) -> ssl.SSLContext:
    chain = b"".join(each.public_bytes(Encoding.PEM) for each in case.chain)
    return stage_context(server, chain, case.key, case.mesh.root.certificate.public_bytes(Encoding.PEM))


# Our own chain check wants a name where OpenSSL would take the common name.
STRICTER_THAN_OPENSSL = {"a member minted without a name"}


@pytest.mark.parametrize("case", corpus(), ids=lambda case: case.title)
def test_openssl_and_our_chain_check_agree(case: Case) -> None:
    member = case.mesh.node()
    try:
        handshake(shows(case, server=False), member_context(True, member))
        handshake(member_context(False, member), shows(case, server=True))
        taken = True
    except ssl.SSLError:
        taken = False
    assert taken == case.chain_ok
    ours = case.chain_ok and case.title not in STRICTER_THAN_OPENSSL
    assert chain_verdict(case) == ours


def chain_verdict(case: Case) -> bool:
    from meshnode.identity.chains import parse_certificate, verify_chain

    try:
        chain = [parse_certificate(each.public_bytes(Encoding.DER)) for each in case.chain]
        verify_chain(chain, case.mesh.root.certificate, case.mesh.now)
    except PeerError:
        return False
    return True


def test_a_client_without_certificate_is_refused() -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate"):
        handshake(bare, member_context(True, TestMesh().node()))


def test_older_tls_is_refused() -> None:
    mesh = TestMesh()
    old = member_context(False, mesh.node())
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        handshake(old, member_context(True, mesh.node()))


def test_the_server_gives_no_tickets() -> None:
    mesh = TestMesh()
    client, _ = handshake(member_context(False, mesh.node()), member_context(True, mesh.node()))
    assert client.version() == "TLSv1.3"
    assert client.session is None or not client.session.has_ticket


def test_a_key_passes_through_no_file_in_the_clear(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[bytes] = []
    load = ssl.SSLContext.load_cert_chain

    def spy(self: ssl.SSLContext, name: str, *rest, **named) -> None:
        seen.append(Path(name).read_bytes())
        load(self, name, *rest, **named)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", spy)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    member_context(True, TestMesh().node())
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in seen[0]
    assert b"BEGIN PRIVATE KEY" not in seen[0]
    assert list(tmp_path.iterdir()) == []


def stage_of(node: Credentials, name: str) -> Credentials:
    """What a stage process on `node` holds."""
    key = Ed25519PrivateKey.generate()
    from datetime import UTC, datetime

    leaf = make_stage(node.authority, key.public_key(), name, datetime.now(UTC))
    return replace(node, key=key, chain=(leaf, *node.chain))


def blocking_pair(upstream: Credentials, downstream: Credentials) -> tuple[bytes | None, bytes | None]:
    """The leaves that two blocking stage processes see of each other."""
    left, right = socket.socketpair()
    seen: list[bytes | None] = []

    def serve() -> None:
        context = stage_context(True, downstream.chain_pem, downstream.key, downstream.root_pem)
        with context.wrap_socket(right, server_side=True) as tls:
            seen.append(tls.getpeercert(binary_form=True))

    thread = threading.Thread(target=serve)
    thread.start()
    context = stage_context(False, upstream.chain_pem, upstream.key, upstream.root_pem)
    with context.wrap_socket(left) as tls:
        mine = tls.getpeercert(binary_form=True)
    thread.join()
    return mine, seen[0]


def test_stages_of_the_plan_find_each_other_and_nobody_else() -> None:
    mesh = TestMesh()
    here, there, third = mesh.node(), mesh.node(), mesh.node()
    head, first = head_name(RUN, here.node_id), stage_name(0, RUN, there.node_id)
    down, up = blocking_pair(stage_of(here, head), stage_of(there, first))
    check_stage_peer(down, first)
    check_stage_peer(up, head)
    for wrong in (stage_name(1, RUN, there.node_id), stage_name(0, RUN, third.node_id), head_name(RUN, there.node_id)):
        with pytest.raises(PeerError, match="planned neighbour"):
            check_stage_peer(down, wrong)
    with pytest.raises(PeerError, match="no certificate"):
        check_stage_peer(None, first)


def test_a_stage_certificate_made_by_another_node_is_refused() -> None:
    mesh = TestMesh()
    here, there = mesh.node(), mesh.node()
    forged = stage_of(here, stage_name(0, RUN, there.node_id))
    victim = stage_of(there, stage_name(1, RUN, there.node_id))
    server = stage_context(True, victim.chain_pem, victim.key, victim.root_pem)
    client = stage_context(False, forged.chain_pem, forged.key, forged.root_pem)
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree"):
        handshake(client, server)
