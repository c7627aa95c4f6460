"""Issuers of the mesh: appointed and revoked where the root key lies, and this node's own appointment.

Invariant: whom the root makes an issuer is on disk here before the certificate is sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial

import trio
from cryptography import x509

from meshnode.app.admin import IssuerListing
from meshnode.app.revoking import Revoking
from meshnode.core.node.mediator import Mediator
from meshnode.errors import ConfigError, PeerError
from meshnode.identity.certificates import ISSUER_VALID, Authority, Role
from meshnode.identity.chains import holder_of, key_bytes, parse_certificate
from meshnode.identity.ids import NodeId, is_id, node_id_of
from meshnode.identity.issuers import Appointment, appointed
from meshnode.io.disk.directory import DataDirectory, Membership
from meshnode.io.transport.appointment import appoint, be_appointed
from meshnode.io.transport.stream import Stream
from meshnode.io.transport.transport import Transport
from meshnode.wire.preface import StreamClass

SOON = timedelta(days=30)
"""Before an issuer's end: a person has to act, and some look once a month."""


class Issuing:
    """`held` is the present membership; `use` takes the one that an appointment makes."""

    def __init__(
        self,
        data: DataDirectory,
        mediator: Mediator,
        transport: Transport,
        revoking: Revoking,
        held: Callable[[], Membership],
        use: Callable[[Membership], None],
    ) -> None:
        self._data = data
        self._mediator = mediator
        self._transport = transport
        self._revoking = revoking
        self._held = held
        self._use = use
        self._turn = trio.Lock()
        self._installing = trio.Lock()
        self._appointments = data.appointments()

    # --- where the root key lies ------------------------------------------------------------------------------

    async def add(self, node: NodeId) -> IssuerListing:
        """Make a member an issuer, for a year. ConfigError where that is not possible, PeerError, LinkLost of it."""
        root = self._root()
        self._require_candidate(node)
        async with self._turn:
            stream = await self._transport.dial(node, self._mediator.addresses_of(node), StreamClass.ISSUER)
            try:
                certificate = await appoint(stream, root, datetime.now(UTC), partial(self._record, node))
            finally:
                await stream.aclose()
        issuer = node_id_of(key_bytes(certificate))
        return next(each for each in self.listings() if each.issuer == issuer)

    def _require_candidate(self, node: NodeId) -> None:
        if not is_id(node):
            raise ConfigError("that is no node id", "`meshnode peers` lists them")
        if node == self._mediator.node:
            raise ConfigError("this node holds the root key", "Name another one: `meshnode peers` lists them.")
        name = self._mediator.name_of(node)
        author = self._mediator.roster.authors.get(node)
        if self._revoking.barred(node):
            raise ConfigError(f"{name} was revoked from this mesh", "`meshnode peers` lists its members")
        if author is None or not self._mediator.reachable(node):
            raise ConfigError(f"{name} is not reachable now", "Start it; `meshnode peers` must show it as linked.")
        if author.role != Role.MEMBER:
            raise ConfigError(f"{name} is a client, which may not let others in", "Name a member.")

    async def _record(self, node: NodeId, certificate: x509.Certificate) -> None:
        name, issuer = self._mediator.name_of(node), node_id_of(key_bytes(certificate))
        new = Appointment(node, name, issuer, certificate.not_valid_after_utc)
        known = appointed(self._appointments, new)
        with trio.CancelScope(shield=True):  # what is on disk and what is in memory must not part
            await trio.to_thread.run_sync(self._data.store_appointments, known)
        self._appointments = known

    async def revoke(self, issuer: NodeId) -> None:
        """Bar an issuer and all that it let in, by the root. ConfigError where that is not possible."""
        await self._revoking.revoke_issuer(self._root(), issuer)

    async def revoke_issuers_on(self, node: NodeId) -> None:
        """Before `node` itself is revoked: its issuer's key would let it in again. ConfigError without the root key."""
        held = [each for each in self.listings() if each.node == node and each.state != "revoked"]
        if held and not self._data.has_root():
            raise ConfigError(
                f"{self._mediator.name_of(node)} is an issuer: it could let itself in again unless the root revokes it",
                "Run it on the machine that holds the root key, or put that key here for the moment.",
            )
        for each in held:
            await self.revoke(NodeId(each.issuer))

    def _root(self) -> Authority:
        root = self._data.root()
        if root is None:
            raise ConfigError(
                "the root key of this mesh is not on this machine",
                "Use the machine that made the mesh; if the key was exported there, put it back for the moment.",
            )
        return root

    # --- everywhere -------------------------------------------------------------------------------------------

    async def serve(self, stream: Stream) -> None:
        """Another node makes this one an issuer: its word is checked by the root's signature alone."""
        own = self._held().credentials
        if not own.role is stream.peer.role is Role.MEMBER:
            raise PeerError("a client neither makes issuers nor becomes one")
        key = await trio.to_thread.run_sync(self._data.issuer_key)

        async def install(certificate: x509.Certificate) -> None:
            keep = partial(self._data.install_issuer, Authority(certificate, key), datetime.now(UTC))
            with trio.CancelScope(shield=True):
                async with self._installing:  # three files, which belong together
                    self._use(await trio.to_thread.run_sync(keep))

        await be_appointed(stream, own, key, install)

    def listings(self) -> tuple[IssuerListing, ...]:
        """Every issuer that this node knows of: its own, those appointed here, and those that let in who is known."""
        roster, own = self._mediator.roster, self._held()
        certified = Counter(NodeId(author.issuer) for author in roster.authors.values())
        certified[node_id_of(key_bytes(own.credentials.chain[1]))] += 1
        found = {
            each.issuer: IssuerListing(each.issuer, each.node, each.name, each.expires) for each in self._appointments
        }
        for node, author in roster.authors.items():
            if author.issuer not in found:  # one certificate each is looked into
                certificates = [parse_certificate(each) for each in roster.chains[node][1:2]]
                found[author.issuer] = self._described(*certificates) if certificates else IssuerListing(author.issuer)
        for certificate in (own.credentials.chain[1], *([own.issuer.certificate] if own.issuer is not None else [])):
            listing = self._described(certificate)
            found[NodeId(listing.issuer)] = listing
        return tuple(self._judged(found[issuer], certified[issuer]) for issuer in sorted(found))

    def _described(self, issuer: x509.Certificate) -> IssuerListing:
        node = holder_of(issuer)
        name = "" if node is None else self._mediator.name_of(node)
        return IssuerListing(node_id_of(key_bytes(issuer)), node or "", name, issuer.not_valid_after_utc)

    def _judged(self, listing: IssuerListing, members: int) -> IssuerListing:
        state = "active"
        if listing.expires_at is not None and listing.expires_at <= datetime.now(UTC):
            state = "expired"
        if self._revoking.revoked(NodeId(listing.issuer)):
            state = "revoked"
        return IssuerListing(listing.issuer, listing.node, listing.name, listing.expires_at, state, members)

    def warnings(self) -> tuple[str, ...]:
        """What a person should see to."""
        found = []
        own = self._mediator.authority.admit(self._mediator.authority.chain)
        reason = self._mediator.membership.revocations.reason(self._mediator.node, NodeId(own.issuer))
        if reason:
            found.append(f"this node was revoked from the mesh ({reason})")
        signer = self._held().issuer
        if signer is None or not self._mediator.roster.entries:
            return tuple(found)
        ends = signer.certificate.not_valid_after_utc
        if ends - datetime.now(UTC) < SOON and not self._data.has_root():
            found.append(
                f"this node's right to invite ends on {ends:%Y-%m-%d}: `meshnode issuer add` for it again, "
                f"where the root key is, gives it {ISSUER_VALID.days} days"
            )
        if sum(each.state == "active" for each in self.listings()) == 1:
            found.append(
                "this node is the only issuer: while it is off nobody can join, and certificates end within a week. "
                "`meshnode issuer add NODE` makes another"
            )
        if self._data.has_root():
            found.append(
                "the root key of this mesh lies on this node: who reads it can let in anybody, for good. "
                "`meshnode root export FILE --remove`, and keep FILE elsewhere"
            )
        return tuple(found)
