"""The issuer's side of joining without an invite: a stranger on the local network, a number, a person who approves.

    joiner -> Approach(name)             one at a time, 10 an hour, from the local network only
    issuer -> Commitment(digest)
    joiner -> Offer(key, nonce)
    issuer -> Reveal(nonce)              both ends show the number
    joiner -> Confirm(signature)         the joiner's person said yes
    issuer -> Admitted(certificate)      this end's person typed the number: `approve`

Invariant: nothing is certified before `approve` was given the number that this very connection led to.
"""

from __future__ import annotations

import hmac
import logging
import secrets
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import trio

from meshnode.errors import ConfigError, LinkLost, PeerError
from meshnode.identity.comparison import commit, number, spoken
from meshnode.identity.domains import Domain
from meshnode.identity.ids import MeshId
from meshnode.identity.invite_book import JoinRefusal
from meshnode.identity.transcript import NO_INVITE, NONCE_BYTES, Transcript, fingerprint
from meshnode.io.transport.addresses import is_lan_host
from meshnode.io.transport.stream import JoinStream
from meshnode.wire import limits
from meshnode.wire.join import Approach, Commitment, Confirm, Offer, Reveal, decode_step, encode_join

log = logging.getLogger("meshnode.join")


@dataclass
class PendingJoin:
    """A machine that waits for a person here."""

    name: str
    """What it calls itself."""
    address: str
    number: str
    """Six digits."""
    deadline: float
    """On trio's clock."""
    approved: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Certifier(Protocol):
    """What the exchange needs of the issuer (join_desk)."""

    def refusal(self, key: bytes) -> JoinRefusal | None:
        """Why this key (SPKI) gets no certificate, if so."""

    def certify(self, key: bytes) -> bytes:
        """Its certificate, DER."""


class ComparisonDesk:
    """At most one exchange at a time."""

    def __init__(self) -> None:
        self._busy = False
        self._begun: deque[float] = deque(maxlen=limits.COMPARISONS_PER_HOUR)
        self._pending: PendingJoin | None = None

    @property
    def pending(self) -> PendingJoin | None:
        """Who waits now."""
        return self._pending

    def approve(self, code: str) -> PendingJoin:
        """The person's answer. A wrong number ends the exchange: it is what a machine in between looks like.

        `ConfigError` when nobody waits or the number is another.
        """
        pending = self._pending
        if pending is None:
            raise ConfigError("no machine waits to join", "Run `meshnode join` on it, then compare the number.")
        typed = "".join(code.split())
        if not hmac.compare_digest(typed.encode(), pending.number.encode()):
            self._pending = None
            pending.scope.cancel()
            raise ConfigError(
                f"{typed[:16]!r} is not the number of this end: the machine was turned away",
                "If it was typed wrong, run `meshnode join` there again. If not, somebody is between the two machines.",
            )
        pending.approved.set()
        return pending

    async def meet(
        self, stream: JoinStream, asked: Approach, mesh: MeshId, leaf: bytes, certifier: Certifier
    ) -> bytes | JoinRefusal:
        """One exchange; the certificate (DER) or why there is none. `PeerError`, `LinkLost` of the joiner."""
        refusal = self._refusal(stream)
        if refusal is not None:
            return refusal
        self._busy = True
        self._begun.append(trio.current_time())
        try:
            transcript = await self._exchange(stream, mesh, leaf, certifier)
            if isinstance(transcript, JoinRefusal):
                return transcript
            stream.prolong(limits.COMPARISON_S)
            deadline = trio.current_time() + limits.COMPARISON_S
            name = "".join(letter if letter.isprintable() else "?" for letter in asked.name)
            self._pending = PendingJoin(name, stream.address, number(transcript), deadline)
            if not await self._agreed(stream, self._pending, transcript):
                return JoinRefusal.NOT_APPROVED
            # Minutes have passed, in which it may have been revoked.
            return certifier.refusal(transcript.public_key) or certifier.certify(transcript.public_key)
        finally:
            self._busy = False
            self._pending = None

    def _refusal(self, stream: JoinStream) -> JoinRefusal | None:
        if not is_lan_host(stream.address):
            return JoinRefusal.CLOSED
        if self._busy:
            return JoinRefusal.BUSY
        full = len(self._begun) == limits.COMPARISONS_PER_HOUR
        if full and self._begun[0] > trio.current_time() - 3600:
            return JoinRefusal.TOO_OFTEN
        return None

    async def _exchange(
        self, stream: JoinStream, mesh: MeshId, leaf: bytes, certifier: Certifier
    ) -> Transcript | JoinRefusal:
        nonce, shown = secrets.token_bytes(NONCE_BYTES), fingerprint(leaf)
        await stream.send_frame(encode_join(Commitment(commit(mesh, shown, nonce))))
        offer = decode_step(await stream.receive_frame(), Offer)
        if refusal := certifier.refusal(offer.public_key):  # before a person is asked
            return refusal
        await stream.send_frame(encode_join(Reveal(nonce)))
        return Transcript(mesh, NO_INVITE, nonce, offer.nonce, shown, offer.public_key, Domain.COMPARISON)

    async def _agreed(self, stream: JoinStream, pending: PendingJoin, transcript: Transcript) -> bool:
        """True when both people said yes in time; `LinkLost` when the joiner went away."""
        log.warning(
            "%r at %s asks to join. If it shows %s: meshnode approve %s",
            pending.name,
            pending.address,
            spoken(pending.number),
            pending.number,
        )
        gone: list[LinkLost | PeerError] = []
        with pending.scope:
            pending.scope.deadline = pending.deadline
            async with trio.open_nursery() as nursery:
                confirmed = trio.Event()
                nursery.start_soon(self._listen, stream, transcript, confirmed, gone)
                await confirmed.wait()
                await pending.approved.wait()
                nursery.cancel_scope.cancel()
                return not gone
        if gone:
            raise gone[0]
        return False

    async def _listen(
        self, stream: JoinStream, transcript: Transcript, confirmed: trio.Event, gone: list[LinkLost | PeerError]
    ) -> None:
        """The joiner's yes, and then its end: whoever went away must not keep the next one waiting."""
        pending = self._pending
        assert pending is not None
        try:
            transcript.check_signature(decode_step(await stream.receive_frame(), Confirm).signature)
            confirmed.set()
            await stream.receive_frame()
            gone.append(PeerError("a joiner that says more than yes"))
        except (LinkLost, PeerError) as problem:
            gone.append(problem)
        pending.scope.cancel()
