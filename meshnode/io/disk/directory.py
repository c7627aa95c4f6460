"""The data directory: everything that a node keeps.

    lock           taken while a node runs
    stages.lock    shared by its stage processes, which may outlive it for a moment
    node.key       0600   who this node is; losing it makes another node
    mesh.pem       node, issuer and root certificate: membership is this one file, so it is there or not
    root.key       0600   only where the mesh was made
    issuers.json   whom this machine, with the root key, made issuers
    issuer.key, issuer.pem   0600 / 0644   only on issuers
    invites.json   0600   the issuer's book
    incarnation    boot counter
    ledger         claims and grants that must survive a restart
    revocations    the revocation lists of all issuers
    demands        models that shall be served, as somebody signed them, and those that were given up
    asked.json     what the last `serve` asked for; another `serve` takes its place
    peers.json     where the members were last seen; only a shortcut, never trusted
    api-token      0600   for routes that change things, on loopback too
    cache/         artifacts by manifest digest

Invariant: every file is replaced whole and durable; private ones are never readable by others.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from meshnode.errors import ConfigError, PeerError
from meshnode.identity.certificates import (
    ISSUER_VALID,
    NODE_VALID,
    Authority,
    Role,
    make_issuer,
    make_node,
    make_root,
)
from meshnode.identity.chains import key_bytes, parse_certificate, peer_identity, verify_chain
from meshnode.identity.credentials import Credentials
from meshnode.identity.ids import NodeId, is_id, node_id_of, short
from meshnode.identity.invite_book import InviteBook, decode_book, encode_book
from meshnode.identity.issuers import Appointment, decode_appointments, encode_appointments
from meshnode.identity.keys import private_key_of, private_key_pem, spki_of
from meshnode.io.disk.atomic import PRIVATE
from meshnode.io.disk.folder import SMALL_FILE, Folder, unusable
from meshnode.io.disk.lock import DirectoryLock

_RENEW_NODE = timedelta(days=1)
_RENEW_ISSUER = timedelta(days=30)
"""Long before the end: members learn of a new issuer certificate when they renew their own."""

_BOOK_BYTES = 32 * 1024 * 1024
"""256 invites of 64 admissions with a certificate each, in JSON: 20 MiB at worst."""

_REVOCATIONS_BYTES = 2 * 1024 * 1024
"""33 lists of at most 30 KB, each with a certificate of at most 2 KB."""
_DEMANDS_BYTES = 3 * 1024 * 1024
_PEERS_BYTES = 1024 * 1024
"""256 members with 8 addresses of at most 260 characters, and room."""


@dataclass(frozen=True)
class Membership:
    """What `mesh.pem` and the keys beside it amount to."""

    credentials: Credentials
    issuer: Authority | None
    """Set where this node may admit others."""


class DataDirectory:
    """An open, locked data directory. Use `open`, and `close` when done."""

    def __init__(self, path: Path, lock: DirectoryLock) -> None:
        self.path = path
        self._files = Folder(path)
        self._lock = lock

    @classmethod
    def open(cls, path: Path) -> DataDirectory:
        """Make (0700) and lock `path`; `ConfigError` when another node uses it or it cannot be written."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = DirectoryLock(path / "lock")
        except OSError as problem:
            raise unusable(path, problem) from None
        for leftover in path.glob("*.part"):  # of a crash between write and rename
            leftover.unlink(missing_ok=True)
        return cls(path, lock)

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    @property
    def cache(self) -> Path:
        """The folder for fetched artifacts; made when asked for."""
        folder = self.path / "cache"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def stages_lock(self) -> Path:
        """What every stage process of this node holds a share of; one name for it, however the directory was given."""
        return self.path.resolve() / "stages.lock"

    # --- who this node is -----------------------------------------------------------------------------

    def node_key(self) -> Ed25519PrivateKey:
        """The node's key, made at first use."""
        key = self._files.parsed("node.key", private_key_of)
        if key is None:
            key = Ed25519PrivateKey.generate()
            self._files.write("node.key", private_key_pem(key), PRIVATE)
        return key

    def make_mesh(self, now: datetime) -> Membership:
        """Found a mesh: root, issuer and this node's certificate. `ConfigError` when there is one already."""
        self._refuse_second_mesh()
        node_key = self.node_key()
        root_key, issuer_key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        root = make_root(root_key, now)
        node = node_id_of(spki_of(node_key.public_key()))
        issuer = make_issuer(Authority(root, root_key), issuer_key.public_key(), now, node)
        own = make_node(Authority(issuer, issuer_key), node_key.public_key(), Role.MEMBER, now)
        self._files.write("root.key", private_key_pem(root_key), PRIVATE)
        self._files.write("issuer.key", private_key_pem(issuer_key), PRIVATE)
        self._files.write("issuer.pem", issuer.public_bytes(Encoding.PEM))
        self.store_invites(InviteBook())
        self._store(Credentials(node_key, (own, issuer), root))
        return self._loaded()

    def join_mesh(self, credentials: Credentials) -> Membership:
        """Keep what `redeem` returned. `ConfigError` when this directory belongs to a mesh already."""
        self._refuse_second_mesh()
        self._store(credentials)
        return self._loaded()

    def renew(self, credentials: Credentials) -> None:
        """Replace the certificates by newer ones of the same mesh and key."""
        self._store(credentials)

    def membership(self, now: datetime) -> Membership | None:
        """The mesh this directory belongs to, or None. An issuer renews its own certificates here: call it daily.

        A joiner's certificate may have ended (`credentials.expires`): it is renewed over JOIN. `ConfigError` when
        files are damaged or do not belong together.
        """
        if self._files.read("mesh.pem") is None:
            return None
        held = self._loaded()
        if held.issuer is not None:
            held = self._renewed(held, held.issuer, now)
        credentials = held.credentials
        try:  # at a time when it was valid: ended is not damaged
            verify_chain(credentials.chain, credentials.root, credentials.expires)
        except PeerError as problem:
            raise ConfigError(
                f"{self.path / 'mesh.pem'} is damaged: {problem}", "Start with an empty --data."
            ) from None
        return held

    def _renewed(self, held: Membership, issuer: Authority, now: datetime) -> Membership:
        """What a day changes on an issuer: its own certificate, and once a month the issuer's."""
        root = self.root()
        if root is not None and _is_older(issuer.certificate, ISSUER_VALID - _RENEW_ISSUER, now):
            fresh = make_issuer(root, issuer.key.public_key(), now, held.credentials.node_id)
            self._files.write("issuer.pem", fresh.public_bytes(Encoding.PEM))
            issuer = Authority(fresh, issuer.key)
        if issuer.certificate.not_valid_after_utc <= now:
            return held  # until the root appoints it again, others renew its certificate
        by_itself = key_bytes(held.credentials.chain[1]) == key_bytes(issuer.certificate)
        if not by_itself or _is_older(held.credentials.chain[0], NODE_VALID - _RENEW_NODE, now):
            self._certify(issuer, now)
        return self._loaded()

    def _certify(self, issuer: Authority, now: datetime) -> None:
        """This node's own certificate by its own issuer: who joins here checks that the two belong together."""
        held = self._loaded().credentials
        own = make_node(issuer, held.key.public_key(), Role.MEMBER, now)
        self._store(Credentials(held.key, (own, issuer.certificate), held.root))

    # --- issuers --------------------------------------------------------------------------------------

    def root(self) -> Authority | None:
        """The root of this mesh as a signer, where its key lies here; `ConfigError` for another mesh's key."""
        key = self._files.parsed("root.key", private_key_of)
        if key is None or self._files.read("mesh.pem") is None:
            return None
        root = self._loaded().credentials.root
        if key_bytes(root) != spki_of(key.public_key()):
            raise ConfigError(f"root.key in {self.path} is not the key of this mesh")
        return Authority(root, key)

    def has_root(self) -> bool:
        """Whether the root's key lies here."""
        return (self.path / "root.key").exists()

    def issuer_key(self) -> Ed25519PrivateKey:
        """The key that this node issues with, or a new one, which `install_issuer` keeps."""
        return self._files.parsed("issuer.key", private_key_of) or Ed25519PrivateKey.generate()

    def install_issuer(self, issuer: Authority, now: datetime) -> Membership:
        """Issue with this from now on; durable when this returns."""
        self._files.write("issuer.key", private_key_pem(issuer.key), PRIVATE)
        self._files.write("issuer.pem", issuer.certificate.public_bytes(Encoding.PEM))
        self._certify(issuer, now)
        return self._loaded()

    def appointments(self) -> tuple[Appointment, ...]:
        """Whom the root made issuers from here."""
        return self._files.parsed("issuers.json", decode_appointments) or ()

    def store_appointments(self, known: tuple[Appointment, ...]) -> None:
        """Durable when this returns."""
        self._files.write("issuers.json", encode_appointments(known))

    def _refuse_second_mesh(self) -> None:
        if self._files.read("mesh.pem") is not None:
            mesh = short(self._loaded().credentials.mesh_id)
            hint = "Use another directory for another mesh: --data PATH."
            raise ConfigError(f"{self.path} belongs to mesh {mesh} already", hint)

    def _store(self, credentials: Credentials) -> None:
        assert spki_of(self.node_key().public_key()) == spki_of(credentials.key.public_key()), "another node's key"
        self._files.write("mesh.pem", credentials.chain_pem + credentials.root_pem)

    def _loaded(self) -> Membership:
        """What is on disk, whole and consistent, whatever the time."""
        certificates = self._files.parsed("mesh.pem", _certificates) or []
        if len(certificates) != 3:
            raise self._files.damaged("mesh.pem")
        key = self.node_key()
        if key_bytes(certificates[0]) != spki_of(key.public_key()):
            raise ConfigError(f"node.key and mesh.pem in {self.path} do not belong together")
        credentials = Credentials(key, tuple(certificates[:-1]), certificates[-1])
        try:
            peer_identity(certificates[0])
        except PeerError:
            raise self._files.damaged("mesh.pem") from None
        return Membership(credentials, self._issuer(credentials.root))

    def _issuer(self, root: x509.Certificate) -> Authority | None:
        key = self._files.parsed("issuer.key", private_key_of)
        certificates = self._files.parsed("issuer.pem", _certificates)
        if key is None or not certificates:
            return None
        if key_bytes(certificates[0]) != spki_of(key.public_key()):
            raise ConfigError(f"issuer.key and issuer.pem in {self.path} do not belong together")
        try:
            certificates[0].verify_directly_issued_by(root)
        except (InvalidSignature, ValueError, TypeError):
            return None  # left by a `make_mesh` that did not get to the end
        return Authority(certificates[0], key)

    # --- what it remembers ----------------------------------------------------------------------------

    def invites(self) -> InviteBook:
        """The issuer's book; an empty one when there is no file."""
        data = self._files.read("invites.json", _BOOK_BYTES)
        return InviteBook() if data is None else decode_book(data)

    def store_invites(self, book: InviteBook) -> None:
        """Durable when this returns."""
        self._files.write("invites.json", encode_book(book), PRIVATE)

    def next_incarnation(self) -> int:
        """The boot counter, one higher than at the last start and durable; `ConfigError` when damaged."""
        last = self._files.parsed("incarnation", _counter) or 0
        self._files.write("incarnation", f"{last + 1}\n".encode())
        return last + 1

    def ledger(self) -> bytes | None:
        """What `store_ledger` kept, or None."""
        return self._files.read("ledger")

    def store_ledger(self, data: bytes) -> None:
        """Durable when this returns; at most 64 KiB."""
        assert len(data) <= SMALL_FILE, "a ledger holds claims and grants, not history"
        self._files.write("ledger", data)

    def revocations(self) -> bytes | None:
        """What `store_revocations` kept, or None."""
        return self._files.read("revocations", _REVOCATIONS_BYTES)

    def store_revocations(self, data: bytes) -> None:
        """Durable when this returns; at most 2 MiB."""
        assert len(data) <= _REVOCATIONS_BYTES, "33 lists of at most 30 KB are kept"
        self._files.write("revocations", data)

    def demands(self) -> bytes | None:
        """What `store_demands` kept, or None."""
        return self._files.read("demands", _DEMANDS_BYTES)

    def store_demands(self, data: bytes) -> None:
        """Durable when this returns; at most 3 MiB."""
        assert len(data) <= _DEMANDS_BYTES, "64 demands of 12 KB and 256 tombstones of 5 KB"
        self._files.write("demands", data)

    def asked(self) -> frozenset[str]:
        """Deployments that the last `serve` made or went on with; empty when the file is missing or damaged."""
        try:
            data = self._files.read("asked.json", SMALL_FILE) or b"[]"
            return frozenset(msgspec.json.decode(data, type=tuple[str, ...]))
        except (msgspec.DecodeError, ValueError, ConfigError):
            return frozenset()

    def store_asked(self, deployments: frozenset[str]) -> None:
        """Durable when this returns."""
        self._files.write("asked.json", msgspec.json.encode(sorted(deployments)))

    def peers(self) -> dict[NodeId, tuple[str, ...]]:
        """Addresses of known members; empty when the file is missing or damaged."""
        try:
            data = self._files.read("peers.json", _PEERS_BYTES) or b"{}"
            found = msgspec.json.decode(data, type=dict[str, tuple[str, ...]])
        except (msgspec.DecodeError, ValueError, ConfigError):
            return {}
        return {NodeId(name): addresses for name, addresses in found.items() if is_id(name)}

    def store_peers(self, peers: Mapping[NodeId, tuple[str, ...]]) -> None:
        """Remember where members were seen."""
        self._files.write("peers.json", msgspec.json.encode(peers))

    def api_token(self) -> str:
        """The token of the routes that change things, made at first use: 32 random bytes in hex."""
        token = self._files.parsed("api-token", lambda data: data.decode("ascii").strip())
        if not token:
            token = secrets.token_hex(32)
            self._files.write("api-token", f"{token}\n".encode(), PRIVATE)
        return token


def _certificates(pem: bytes) -> list[x509.Certificate]:
    found = x509.load_pem_x509_certificates(pem)
    return [parse_certificate(certificate.public_bytes(Encoding.DER)) for certificate in found]


def _counter(data: bytes) -> int:
    value = int(data.decode("ascii"))
    if not 0 <= value < 2**62:
        raise ValueError("not a boot counter")
    return value


def _is_older(certificate: x509.Certificate, left: timedelta, now: datetime) -> bool:
    """True when less than `left` remains of it."""
    return certificate.not_valid_after_utc - now < left
