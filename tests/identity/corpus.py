"""Chains, good and bad, with what they should be taken for: one corpus for OpenSSL's verdict and ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshnode.identity.certificates import Authority, Role, make_node, make_stage, stage_name
from meshnode.identity.ids import node_id_of
from meshnode.identity.keys import spki_of
from tests.identity.mesh import TestMesh

DAY = timedelta(days=1)
RUN = "0123456789abcdef"


@dataclass(frozen=True)
class Case:
    """One chain. `chain_ok`: OpenSSL takes it; `member_ok`: it may also open a MEMBER stream."""

    title: str
    key: Ed25519PrivateKey
    chain: tuple[x509.Certificate, ...]
    chain_ok: bool
    member_ok: bool = False
    mesh: TestMesh = field(default_factory=TestMesh)
    """The mesh that the chain claims to belong to; set by `corpus`."""


@dataclass(frozen=True)
class Made:
    """A certificate by hand: a good member's unless told otherwise; `None` leaves an extension out."""

    name: Sequence[x509.GeneralName] | None = ()
    title: str = "x"
    unit: str | None = "member"
    start: timedelta = -DAY
    end: timedelta = DAY
    constraints: x509.ExtensionType | None = None
    basic: tuple[bool, int | None] = (False, None)
    basic_critical: bool = True
    usage: tuple[bool, bool] | None = (True, False)
    extended: tuple[x509.ObjectIdentifier, ...] | None = (
        ExtendedKeyUsageOID.CLIENT_AUTH,
        ExtendedKeyUsageOID.SERVER_AUTH,
    )
    own_identifier: bool = True
    signer_identifier: Any = "right"
    extra: x509.ExtensionType | None = None

    def sign(self, signer: Authority, key: Ed25519PrivateKey, now: datetime) -> x509.Certificate:
        parts = [x509.NameAttribute(NameOID.COMMON_NAME, self.title)]
        if self.unit is not None:
            parts.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, self.unit))
        public = key.public_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(parts))
            .issuer_name(signer.certificate.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + self.start)
            .not_valid_after(now + self.end)
            .add_extension(x509.BasicConstraints(*self.basic), critical=self.basic_critical)
        )
        for extension, critical in self._extensions(signer, key):
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(signer.key, None)

    def _extensions(self, signer: Authority, key: Ed25519PrivateKey) -> list[tuple[x509.ExtensionType, bool]]:
        found: list[tuple[x509.ExtensionType, bool]] = []
        if self.name:
            found.append((x509.SubjectAlternativeName(self.name), False))
        if self.constraints is not None:
            found.append((self.constraints, True))
        if self.usage is not None:
            digital, certificates = self.usage
            rest = [False] * 4
            found.append((x509.KeyUsage(digital, *rest, certificates, False, False, False), True))
        if self.extended is not None:
            found.append((x509.ExtendedKeyUsage(self.extended), False))
        if self.own_identifier:
            found.append((x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False))
        if self.signer_identifier == "right":
            found.append((x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), False))
        elif self.signer_identifier is not None:
            found.append((x509.AuthorityKeyIdentifier(self.signer_identifier, None, None), False))
        if self.extra is not None:
            found.append((self.extra, True))
        return found


def corpus() -> list[Case]:
    """Every case; all valid around the real time, because OpenSSL reads the clock."""
    mesh, stranger = TestMesh(datetime.now(UTC)), TestMesh(datetime.now(UTC))
    return [replace(case, mesh=mesh) for case in (*_chains(mesh, stranger), *_minted(mesh), *_leaves(mesh))]


def _own_name(key: Ed25519PrivateKey) -> x509.DNSName:
    return x509.DNSName(f"{node_id_of(spki_of(key.public_key()))}.mesh")


def _chains(mesh: TestMesh, stranger: TestMesh) -> list[Case]:
    now, key = mesh.now, Ed25519PrivateKey.generate()
    issuer = mesh.issuer.certificate
    member = make_node(mesh.issuer, key.public_key(), Role.MEMBER, now)
    client = make_node(mesh.issuer, key.public_key(), Role.CLIENT, now)
    old_issuer_key, tight_key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    signs = Made(unit=None, basic=(True, 1), usage=(True, True), extended=None)
    old_issuer = Authority(
        replace(signs, start=-2 * DAY, end=-DAY).sign(mesh.root, old_issuer_key, now), old_issuer_key
    )
    no_usage = Authority(replace(signs, usage=(True, False)).sign(mesh.root, tight_key, now), tight_key)
    loose = Authority(replace(signs, basic_critical=False).sign(mesh.root, tight_key, now), tight_key)
    no_room = Authority(replace(signs, basic=(True, 0)).sign(mesh.root, tight_key, now), tight_key)
    impostor = Authority(issuer, stranger.issuer.key)
    swapped = Made(name=[_own_name(key)], basic=(True, 0), usage=(True, True), signer_identifier=b"x" * 20)
    by_old, by_no_usage, by_loose, by_no_room = (
        make_node(authority, key.public_key(), Role.MEMBER, now) for authority in (old_issuer, no_usage, loose, no_room)
    )
    foreign = make_node(stranger.issuer, key.public_key(), Role.MEMBER, now)
    own = node_id_of(spki_of(key.public_key()))
    crowded = make_stage(Authority(by_no_room, key), key.public_key(), stage_name(0, RUN, own), now)
    return [
        Case("a member", key, (member, issuer), True, True),
        Case("a client", key, (client, issuer), True, True),
        Case("another mesh", key, (foreign, stranger.issuer.certificate), False),
        Case("another mesh's leaf under our issuer", key, (foreign, issuer), False),
        Case("no issuer in the chain", key, (member,), False),
        Case("signed by a key that is not the issuer's", key, (Made().sign(impostor, key, now), issuer), False),
        Case("an issuer that ended", key, (by_old, old_issuer.certificate), False),
        Case("an issuer whose key may not sign", key, (by_no_usage, no_usage.certificate), False),
        Case("an issuer with constraints that are not critical", key, (by_loose, loose.certificate), False),
        Case("a node as a leaf of an authority without room below", key, (by_no_room, no_room.certificate), True, True),
        Case("a stage below an authority without room", key, (crowded, by_no_room, no_room.certificate), False),
        Case("another signer named", key, (swapped.sign(mesh.issuer, key, now), issuer), False),
        Case(
            "ended", key, (replace(_member(key), start=-9 * DAY, end=-DAY).sign(mesh.issuer, key, now), issuer), False
        ),
        Case(
            "not begun", key, (replace(_member(key), start=DAY, end=9 * DAY).sign(mesh.issuer, key, now), issuer), False
        ),
    ]


def _member(key: Ed25519PrivateKey) -> Made:
    return Made(name=[_own_name(key)], basic=(True, 0), usage=(True, True))


def _minted(mesh: TestMesh) -> list[Case]:
    """What a member's own key can sign."""
    now, fresh = mesh.now, Ed25519PrivateKey.generate()
    node, client = mesh.node(), mesh.node(Role.CLIENT)
    own = node.authority
    upper = (node.chain[0], mesh.issuer.certificate)
    below = make_stage(own, fresh.public_key(), stage_name(0, RUN, node.node_id), now)
    foreign = make_stage(own, fresh.public_key(), stage_name(0, RUN, mesh.node().node_id), now)
    own_name = x509.DNSName(f"{node.node_id}.mesh")
    by_client = make_stage(client.authority, fresh.public_key(), stage_name(0, RUN, client.node_id), now)
    authority = _member(fresh)

    def make(made: Made) -> x509.Certificate:
        return made.sign(own, fresh, now)

    sub = Authority(
        make(Made(name=[own_name], basic=(True, None), usage=(True, True), extended=None)), Ed25519PrivateKey.generate()
    )
    return [
        Case("a stage of its own", fresh, (below, *upper), True),
        Case("a stage of another node", fresh, (foreign, *upper), False),
        Case("a member minted by a member", fresh, (make(authority), *upper), False),
        Case("a member minted without a name", fresh, (make(replace(authority, name=None)), *upper), True),
        Case(
            "a member minted with the name in CN only",
            fresh,
            (make(replace(authority, name=None, title=str(_own_name(fresh).value))), *upper),
            False,
        ),
        Case("a fresh key under the member's own name", fresh, (make(Made(name=[own_name])), *upper), True),
        Case(
            "its own name and a foreign one",
            fresh,
            (make(Made(name=[own_name, _own_name(fresh)])), *upper),
            False,
        ),
        Case("a stage signed by a client", fresh, (by_client, client.chain[0], mesh.issuer.certificate), False),
        Case("an authority below a node", fresh, (sub.certificate, *upper), True),
    ]


def _leaves(mesh: TestMesh) -> list[Case]:
    """Leaves that the issuer itself might sign by mistake."""
    now, key = mesh.now, Ed25519PrivateKey.generate()
    good = _member(key)
    own, client_use = _own_name(key), (ExtendedKeyUsageOID.CLIENT_AUTH,)
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4.5"), b"\x05\0")
    made = [
        ("without a name", replace(good, name=None), True, False),
        ("with two names", replace(good, name=[own, x509.DNSName("b.mesh")]), True, False),
        ("with its name twice", replace(good, name=[own, own]), True, False),
        ("with an address for a name", replace(good, name=[x509.RFC822Name("a@b.mesh")]), True, False),
        ("with another node's name", replace(good, name=[_own_name(Ed25519PrivateKey.generate())]), True, False),
        ("without a role", replace(good, unit=None), True, False),
        ("with an unknown role", replace(good, unit="king"), True, False),
        ("a client that may sign", replace(good, unit="client"), True, False),
        ("a member that may not sign", replace(good, basic=(False, None), usage=(True, False)), True, False),
        ("for clients only", replace(good, extended=client_use), False, False),
        ("without extended usage", replace(good, extended=None), True, True),
        ("without digital signature", replace(good, usage=(False, True)), False, False),
        ("with an unknown critical extension", replace(good, extra=unknown), False, False),
        ("without its signer's identifier", replace(good, signer_identifier=None), False, False),
        ("without its own identifier", replace(good, own_identifier=False), False, False),
    ]
    return [
        Case(title, key, (each.sign(mesh.issuer, key, now), mesh.issuer.certificate), chain_ok, member_ok)
        for title, each, chain_ok, member_ok in made
    ]
