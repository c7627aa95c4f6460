"""Checking certificates: who a peer is, and whether a chain leads to the mesh root.

TLS links are checked by OpenSSL against the root (io/transport); what OpenSSL does not check stands in
`peer_identity` and `check_stage_leaf`: a leaf without a name passes OpenSSL. Chains that arrive inside messages
are checked by `verify_chain`, which `cryptography.x509.verification` cannot do (it refuses these chains) and whose
verdicts are compared with OpenSSL's on one corpus in the tests.

Invariant: everything raised for a foreign certificate is `PeerError`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from meshnode.errors import PeerError
from meshnode.identity.certificates import RENEWABLE, Role, node_name
from meshnode.identity.ids import MeshId, NodeId, is_id, mesh_id_of, node_id_of
from meshnode.identity.keys import spki_of

CHAIN_LENGTH = 3
"""Certificates below the root: issuer, node, stage."""

CERTIFICATE_BYTES = 2048
"""Ours are 400 to 700 bytes of DER."""

_UNDERSTOOD = {
    ExtensionOID.BASIC_CONSTRAINTS,
    ExtensionOID.KEY_USAGE,
    ExtensionOID.EXTENDED_KEY_USAGE,
    ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    ExtensionOID.NAME_CONSTRAINTS,
    ExtensionOID.SUBJECT_KEY_IDENTIFIER,
    ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
}

_SIGNATURE = b"\x03\x41\x00"
"""DER in front of the 64 bytes of a signature: a BIT STRING of which no bit is unused. `cryptography` also takes one
whose last bits are said to be unused where they are 0; OpenSSL does not, and one certificate would have many hashes."""

# What `cryptography` raises for certificates that parse at the outside and not inside.
_MALFORMED = (
    ValueError,
    TypeError,
    Warning,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    x509.InvalidVersion,
)

_E = TypeVar("_E", bound=x509.ExtensionType)


@dataclass(frozen=True)
class PeerIdentity:
    """Who is at the other end of a link, by the certificate that was checked."""

    node_id: NodeId
    role: Role
    fingerprint: bytes
    """SHA-256 of the certificate's DER."""
    expires: datetime
    issuer: NodeId | None = None
    """The key that signed the certificate, where the whole chain was seen."""


def parse_certificate(der: bytes) -> x509.Certificate:
    """A certificate from outside; `PeerError` when it does not parse or is too long."""
    if len(der) > CERTIFICATE_BYTES:
        raise PeerError(f"a certificate is longer than {CERTIFICATE_BYTES} bytes")
    try:
        # The parser warns of what it only tolerates (a serial number below 1): ours have none of that.
        with warnings.catch_warnings(action="error"):
            certificate = x509.load_der_x509_certificate(der)
            key = certificate.public_key()
            # Extensions are parsed on first use: do it here, where it may fail.
            extensions = certificate.extensions
    except _MALFORMED as problem:
        raise PeerError(f"a certificate does not parse ({type(problem).__name__})") from None
    if not isinstance(key, Ed25519PublicKey):
        raise PeerError("a certificate's key is not Ed25519")
    if not der.endswith(_SIGNATURE + certificate.signature):
        raise PeerError("a certificate's signature is not written as DER wants it")
    for extension in extensions:
        if extension.critical and extension.oid not in _UNDERSTOOD:
            raise PeerError("a certificate has an unknown critical extension")
    return certificate


def peer_identity(leaf: x509.Certificate) -> PeerIdentity:
    """Who a MEMBER link's leaf names; `PeerError` unless its only name is the hash of its own key."""
    node_id = node_id_of(spki_of(_key(leaf)))
    if _only_name(leaf) != node_name(node_id):
        raise PeerError("the certificate's name is not the hash of its key")
    units = leaf.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    if len(units) != 1 or units[0].value not in tuple(Role):
        raise PeerError("the certificate names no role")
    role = Role(units[0].value)
    if (role is Role.MEMBER) != _is_authority(leaf):
        raise PeerError("the certificate's role and rights do not agree")
    fingerprint = hashlib.sha256(leaf.public_bytes(Encoding.DER)).digest()
    return PeerIdentity(node_id, role, fingerprint, leaf.not_valid_after_utc)


def mesh_id_of_root(root: x509.Certificate) -> MeshId:
    """The mesh that a root certificate stands for."""
    return mesh_id_of(spki_of(_key(root)))


def key_bytes(certificate: x509.Certificate) -> bytes:
    """The certificate's public key, DER SubjectPublicKeyInfo."""
    return spki_of(_key(certificate))


def check_stage_leaf(leaf: x509.Certificate, expected_name: str) -> None:
    """`PeerError` unless the leaf's only name is `expected_name` (from `stage_name` or `head_name`)."""
    if _only_name(leaf) != expected_name:
        raise PeerError("the certificate is not the one of the planned neighbour")
    if _is_authority(leaf):
        raise PeerError("a stage's certificate may not sign")


def verify_chain(chain: Sequence[x509.Certificate], root: x509.Certificate, now: datetime) -> None:
    """`PeerError` unless `chain` (leaf first, without the root) leads to `root` at `now`.

    The same verdict as OpenSSL with VERIFY_X509_STRICT for a leaf used as TLS client and server.
    """
    if not 1 <= len(chain) <= CHAIN_LENGTH:
        raise PeerError(f"a chain of {len(chain)} certificates")
    links = [*chain, root]
    for position, certificate in enumerate(links):
        _check_valid(certificate, now)
        signer = links[position + 1] if position < len(chain) else certificate
        _check_signed(certificate, signer)
        if position > 0:
            _check_authority(certificate, below=position - 1)
            for lower in chain[:position]:
                _check_name_constraints(certificate, lower)
    _check_leaf(chain[0])


def check_issuer(issuer: x509.Certificate, root: x509.Certificate) -> None:
    """`PeerError` unless the root made this key an issuer, whenever that was."""
    _check_signed(issuer, root)
    _check_authority(issuer, below=1)


def holder_of(issuer: x509.Certificate) -> NodeId | None:
    """The node that the root named as holding this issuer's key; None in certificates made before that was said."""
    units = issuer.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    value = units[0].value if len(units) == 1 else ""
    return NodeId(value) if isinstance(value, str) and is_id(value) else None


def check_renewable(leaf: x509.Certificate, issuer: x509.Certificate, root: x509.Certificate, now: datetime) -> Role:
    """The role of a node certificate that `issuer`, made one by `root`, once signed.

    `PeerError` when it ended too long ago. Whether the issuer was revoked is for the caller to know.
    """
    check_issuer(issuer, root)
    _check_signed(leaf, issuer)
    if now > leaf.not_valid_after_utc + RENEWABLE:
        raise PeerError("a certificate ended too long ago to be renewed")
    return peer_identity(leaf).role


def _check_valid(certificate: x509.Certificate, now: datetime) -> None:
    if now < certificate.not_valid_before_utc:
        raise PeerError("a certificate is not valid yet: compare the clocks of both machines")
    if now > certificate.not_valid_after_utc:
        raise PeerError("a certificate has expired")


def _check_signed(certificate: x509.Certificate, signer: x509.Certificate) -> None:
    own = _extension(signer, x509.SubjectKeyIdentifier)
    named = _extension(certificate, x509.AuthorityKeyIdentifier)
    if own is None or named is None or named.key_identifier != own.digest:
        raise PeerError("a certificate names another signer")
    try:
        certificate.verify_directly_issued_by(signer)
    except (InvalidSignature, ValueError, TypeError):
        raise PeerError("a certificate was not signed by the one above it") from None


def _check_authority(certificate: x509.Certificate, below: int) -> None:
    """`below`: how many authorities stand between this one and the leaf."""
    basic = _extension(certificate, x509.BasicConstraints)
    usage = _extension(certificate, x509.KeyUsage)
    if basic is None or not basic.ca or not _is_critical(certificate, x509.BasicConstraints):
        raise PeerError("a certificate was signed by one that may not sign")
    if basic.path_length is not None and basic.path_length < below:
        raise PeerError("a chain is longer than its authority allows")
    if usage is None or not usage.key_cert_sign:
        raise PeerError("a certificate was signed by a key that may not sign")
    _check_extended_usage(certificate)


def _check_leaf(leaf: x509.Certificate) -> None:
    usage = _extension(leaf, x509.KeyUsage)
    if usage is None or not usage.digital_signature:
        raise PeerError("a certificate's key may not authenticate")
    if _extension(leaf, x509.SubjectKeyIdentifier) is None:
        raise PeerError("a certificate names no key identifier")
    _check_extended_usage(leaf)


def _check_extended_usage(certificate: x509.Certificate) -> None:
    usage = _extension(certificate, x509.ExtendedKeyUsage)
    if usage is not None and not {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH} <= set(usage):
        raise PeerError("a certificate is not for both ends of a link")


def _check_name_constraints(authority: x509.Certificate, lower: x509.Certificate) -> None:
    constraints = _extension(authority, x509.NameConstraints)
    if constraints is None:
        return
    permitted = constraints.permitted_subtrees
    if constraints.excluded_subtrees or permitted is None or not all(isinstance(p, x509.DNSName) for p in permitted):
        raise PeerError("a name constraint is of an unknown form")
    names = _extension(lower, x509.SubjectAlternativeName)
    if names is None:
        # OpenSSL reads the common name then; none of our certificates goes without a name.
        raise PeerError("a certificate carries no name, and its signer may name only its own")
    for name in names:
        if not isinstance(name, x509.DNSName):
            continue  # unconstrained here as for OpenSSL; `_only_name` refuses the certificate later
        if not any(name.value == p.value or name.value.endswith(f".{p.value}") for p in permitted):
            raise PeerError("a certificate's name lies outside what its signer may name")


def _only_name(certificate: x509.Certificate) -> str:
    names = _extension(certificate, x509.SubjectAlternativeName)
    if names is None or len(list(names)) != 1:
        raise PeerError("a certificate must carry exactly one name")
    name = next(iter(names))
    if not isinstance(name, x509.DNSName):
        raise PeerError("a certificate's name is not a DNS name")
    return name.value


def _is_authority(certificate: x509.Certificate) -> bool:
    basic = _extension(certificate, x509.BasicConstraints)
    return basic is not None and basic.ca


def _key(certificate: x509.Certificate) -> Ed25519PublicKey:
    key = certificate.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise PeerError("a certificate's key is not Ed25519")
    return key


def _is_critical(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> bool:
    return certificate.extensions.get_extension_for_class(kind).critical


def _extension(certificate: x509.Certificate, kind: type[_E]) -> _E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
    except _MALFORMED as problem:
        raise PeerError(f"a certificate does not parse ({type(problem).__name__})") from None
