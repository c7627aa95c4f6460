"""Making certificates: root -> issuer -> node -> stage or head.

Invariant: everything in a certificate is chosen here by the signer; nothing is copied from a request but
the public key. A node may sign only names below its own, by a critical name constraint: without it a member could
mint a leaf for a fresh key and be let in as a new member.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshnode.identity.ids import NodeId, is_id, mesh_id_of, node_id_of, short
from meshnode.identity.keys import spki_of

BACKDATED = timedelta(hours=24)
"""Every notBefore lies this far back: clocks of home machines differ."""

ROOT_VALID = timedelta(days=20 * 365)
"""The root is the mesh; replacing it means a new mesh."""

ISSUER_VALID = timedelta(days=365)
NODE_VALID = timedelta(days=7)
"""Bounds how long a revoked member gets in where nobody heard of the revocation; renewed daily."""

RENEWABLE = timedelta(days=180)
"""So long after its end a node's certificate still gets its key a new one: a laptop left in a drawer."""

STAGE_VALID = timedelta(hours=24)
"""Freshness comes from the fence; 15 s were refused at 20 s of clock difference."""

SUFFIX = "mesh"
"""Last label of every name; never looked up, only compared."""

RUN_CHARACTERS = 16
"""A run in a name: 8 bytes in hex, so that `s63.<run>.<id>.mesh` is 78 of 253 characters."""

_RUN = re.compile(r"[0-9a-f]{16}")


class Role(StrEnum):
    """What a node may do; stands in the certificate's OU."""

    MEMBER = "member"
    CLIENT = "client"


@dataclass(frozen=True)
class Authority:
    """A certificate and the private key of its public key: whoever signs."""

    certificate: x509.Certificate
    key: Ed25519PrivateKey


def node_name(node_id: NodeId) -> str:
    """The only name of a node certificate."""
    return f"{node_id}.{SUFFIX}"


def stage_name(stage: int, run: str, node_id: NodeId) -> str:
    """The only name of stage `stage` (from 0) of `run` (16 hex digits) on `node_id`."""
    return _leaf_name(f"s{stage}", run, node_id)


def head_name(run: str, coordinator: NodeId) -> str:
    """The only name of the head of `run` on its coordinator."""
    return _leaf_name("head", run, coordinator)


def _leaf_name(label: str, run: str, node_id: NodeId) -> str:
    assert _RUN.fullmatch(run), "a run is 16 hex digits"
    assert is_id(node_id), "not a node id"
    return f"{label}.{run}.{node_name(node_id)}"


def make_root(key: Ed25519PrivateKey, now: datetime) -> x509.Certificate:
    """The mesh root, signed by itself; `mesh_id_of` its key is the mesh's id."""
    mesh = mesh_id_of(spki_of(key.public_key()))
    name = _name(f"meshnode root {short(mesh)}")
    builder = _builder(name, key.public_key(), now, ROOT_VALID).issuer_name(name)
    return _sign_authority(builder, key, key.public_key(), path_length=2)


def make_issuer(root: Authority, key: Ed25519PublicKey, now: datetime, node: NodeId | None = None) -> x509.Certificate:
    """A certificate that signs node certificates, and no further issuer (path length 1).

    `node` holds the key and is named, so that everybody can tell whose issuer it is: revoking a node alone would
    leave that key.
    """
    name = _name(f"meshnode issuer {short(node_id_of(spki_of(key)))}", node)
    builder = _builder(name, key, now, ISSUER_VALID).issuer_name(root.certificate.subject)
    return _sign_authority(builder, root.key, root.key.public_key(), path_length=1)


def make_node(issuer: Authority, key: Ed25519PublicKey, role: Role, now: datetime) -> x509.Certificate:
    """The certificate of the node with `key`: a member's signs its stages, a client's signs nothing."""
    name = node_name(node_id_of(spki_of(key)))
    builder = _leaf_builder(_name(name, role.value), key, now, NODE_VALID, name)
    builder = builder.issuer_name(issuer.certificate.subject)
    if role is Role.CLIENT:
        return _sign_leaf(builder, issuer.key)
    only = x509.NameConstraints(permitted_subtrees=[x509.DNSName(name)], excluded_subtrees=None)
    builder = builder.add_extension(only, critical=True)
    return _sign_authority(builder, issuer.key, issuer.key.public_key(), path_length=0)


def make_stage(node: Authority, key: Ed25519PublicKey, name: str, now: datetime) -> x509.Certificate:
    """The leaf of a stage or head process, `name` from `stage_name` or `head_name` of this very node."""
    # A common name holds 64 characters (RFC 5280): the labels that differ, not the whole name.
    builder = _leaf_builder(_name(".".join(name.split(".")[:2])), key, now, STAGE_VALID, name)
    return _sign_leaf(builder.issuer_name(node.certificate.subject), node.key)


def _name(title: str, unit: str | None = None) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, title)]
    if unit is not None:
        parts.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit))
    return x509.Name(parts)


def _builder(subject: x509.Name, key: Ed25519PublicKey, now: datetime, valid: timedelta) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + valid)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _leaf_builder(
    subject: x509.Name, key: Ed25519PublicKey, now: datetime, valid: timedelta, name: str
) -> x509.CertificateBuilder:
    both = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    return (
        _builder(subject, key, now, valid)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(both), critical=False)
    )


def _sign_authority(
    builder: x509.CertificateBuilder, key: Ed25519PrivateKey, signer: Ed25519PublicKey, path_length: int
) -> x509.Certificate:
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
        .sign(key, None)
    )


def _sign_leaf(builder: x509.CertificateBuilder, key: Ed25519PrivateKey) -> x509.Certificate:
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, None)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,  # also on a node's certificate: it is a TLS leaf and an authority
        key_cert_sign=signs_certificates,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
