"""TLS contexts: 1.3 only, both sides show a certificate, the mesh root is the only anchor.

Used by the node's event loop and, with blocking sockets, by stage processes; make a context once and keep it:
a handshake takes 2 ms with a kept one.

Invariant: a context that verifies does so under VERIFY_X509_STRICT; names are checked by
`identity.chains` after the handshake, because OpenSSL lets a leaf without a name pass.
"""

from __future__ import annotations

import os
import secrets
import ssl
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from meshnode.errors import PeerError
from meshnode.identity.chains import check_stage_leaf, parse_certificate
from meshnode.identity.credentials import Credentials


def member_context(server: bool, credentials: Credentials) -> ssl.SSLContext:
    """For MEMBER streams: shows the node's chain and demands one of the same mesh."""
    return stage_context(server, credentials.chain_pem, credentials.key, credentials.root_pem)


def stage_context(server: bool, chain_pem: bytes, key: Ed25519PrivateKey, root_pem: bytes) -> ssl.SSLContext:
    """For STAGE streams (stage and head processes); `chain_pem` is leaf first, without the root."""
    context = _bare(server)
    _show(context, chain_pem, key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=root_pem.decode("ascii"))
    return context


def join_server_context(credentials: Credentials) -> ssl.SSLContext:
    """For JOIN: shows the issuer node's chain, asks for nothing (the joiner has no certificate yet)."""
    context = _bare(server=True)
    _show(context, credentials.chain_pem, credentials.key)
    context.verify_mode = ssl.CERT_NONE
    return context


def join_client_context() -> ssl.SSLContext:
    """For JOIN: verifies nothing; the joiner checks pins and chain itself before it sends anything."""
    context = _bare(server=False)
    context.verify_mode = ssl.CERT_NONE
    return context


def check_stage_peer(der: bytes | None, expected_name: str) -> None:
    """`PeerError` unless the peer's leaf (`getpeercert(True)`) carries exactly `expected_name`."""
    if der is None:
        raise PeerError("the peer showed no certificate")
    check_stage_leaf(parse_certificate(der), expected_name)


def _bare(server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # names are no host names; identity.chains checks them
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
    if server:
        context.num_tickets = 0  # a resumed session would skip the certificate checks
    return context


def _show(context: ssl.SSLContext, chain_pem: bytes, key: Ed25519PrivateKey) -> None:
    """Load a key that is in memory: `ssl` reads files only, so it passes through one, encrypted."""
    password = secrets.token_bytes(32).hex().encode()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
    descriptor, name = tempfile.mkstemp(prefix="meshnode-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem + chain_pem)
        context.load_cert_chain(name, password=password)
    finally:
        Path(name).unlink()
