"""The issuer's book of invites: what was promised, to whom it was given, what is refused.

A value: every operation returns a new book, and the caller makes it durable before it acts on the answer.

Invariant: a key is marked as admitted before a certificate for it is signed, so that a crash or a race can
cost a retry and never a second certificate for another key.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum

import msgspec

from meshnode.errors import ConfigError
from meshnode.identity.certificates import Role
from meshnode.identity.transcript import Transcript

FAILURES_THAT_LOCK = 5
"""128-bit secrets are not guessed: somebody is trying."""

MOST_INVITES = 256
"""In one book, finished ones included; they answer a retry and the list, the oldest go first."""

MOST_USES = 64
"""Machines that one invite may admit."""

LONGEST_LIFE = timedelta(days=30)
"""An invite in an old chat log should be worthless."""


class InviteState(StrEnum):
    """What an invite is good for."""

    OPEN = "open"
    USED = "used"
    EXPIRED = "expired"
    REVOKED = "revoked"
    LOCKED = "locked"


class JoinRefusal(StrEnum):
    """Why a JOIN got no certificate; travels to the joiner."""

    UNKNOWN = "unknown"
    USED = "used"
    EXPIRED = "expired"
    REVOKED = "revoked"
    LOCKED = "locked"
    WRONG_PROOF = "wrong_proof"
    NOT_RENEWABLE = "not_renewable"
    CLOSED = "closed"
    BUSY = "busy"
    TOO_OFTEN = "too_often"
    NOT_APPROVED = "not_approved"
    BARRED = "barred"


class Admission(msgspec.Struct, frozen=True):
    """A key that an invite admitted; `certificate` (DER) is empty until it was signed."""

    public_key: bytes
    certificate: bytes = b""


class InviteEntry(msgspec.Struct, frozen=True):
    """One invite. Times are UTC."""

    invite_id: bytes
    key: bytes
    """MAC key (`invite_key`); empty as soon as nothing can be redeemed any more."""
    role: Role
    uses: int
    created: datetime
    expires: datetime
    failures: int = 0
    revoked: bool = False
    admitted: tuple[Admission, ...] = ()

    def __repr__(self) -> str:
        return f"InviteEntry({self.invite_id.hex()}, {self.role}, {len(self.admitted)} of {self.uses})"  # no key

    def state(self, now: datetime) -> InviteState:
        """What it is good for at `now`."""
        if self.revoked:
            return InviteState.REVOKED
        if len(self.admitted) >= self.uses:
            return InviteState.USED
        if self.failures >= FAILURES_THAT_LOCK:
            return InviteState.LOCKED
        return InviteState.EXPIRED if now >= self.expires else InviteState.OPEN


class InviteBook(msgspec.Struct, frozen=True):
    """All invites of one issuer, oldest first."""

    entries: tuple[InviteEntry, ...] = ()

    def create(self, entry: InviteEntry) -> InviteBook:
        """With a new invite; `ConfigError` for impossible uses or expiry, or when the book is full."""
        check_terms(entry.uses, entry.expires - entry.created)
        assert self._find(entry.invite_id) is None, "invite ids are drawn at random from 64 bits"
        kept = list(self.forget(entry.created).entries)
        while len(kept) >= MOST_INVITES:
            finished = next((e for e in kept if e.state(entry.created) is not InviteState.OPEN), None)
            if finished is None:
                raise ConfigError(f"{len(kept)} invites are open", "Revoke some: `meshnode invites revoke ID`.")
            kept.remove(finished)
        return InviteBook((*kept, entry))

    def redeem(self, transcript: Transcript, mac: bytes, now: datetime) -> tuple[InviteBook, InviteEntry | JoinRefusal]:
        """Admit the transcript's key, or say why not. The joiner's signature must have been checked.

        Returns the new book (make it durable first, also after a refusal: failures are counted in it) and
        the entry whose `admitted` holds the key. The same key again gets the same answer.
        """
        entry = self._find(transcript.invite_id)
        if entry is None:
            return self, JoinRefusal.UNKNOWN
        state = entry.state(now)
        if state is InviteState.REVOKED:
            return self, JoinRefusal.REVOKED
        if any(a.public_key == transcript.public_key for a in entry.admitted):
            return self, entry
        if state is not InviteState.OPEN:
            return self, JoinRefusal(state.value)
        if not transcript.proves(entry.key, mac):
            entry = msgspec.structs.replace(entry, failures=entry.failures + 1)
            return self._with(entry, now), JoinRefusal.WRONG_PROOF
        entry = msgspec.structs.replace(entry, admitted=(*entry.admitted, Admission(transcript.public_key)))
        return self._with(entry, now), entry

    def certified(self, invite_id: bytes, public_key: bytes, certificate: bytes, now: datetime) -> InviteBook:
        """With the certificate (DER) of an admitted key, for its retries."""
        entry = self._find(invite_id)
        assert entry is not None, "certified before it was redeemed"
        admitted = tuple(
            Admission(public_key, certificate) if a.public_key == public_key else a for a in entry.admitted
        )
        return self._with(msgspec.structs.replace(entry, admitted=admitted), now)

    def revoke(self, invite_id: bytes, now: datetime) -> InviteBook:
        """With that invite worthless; `ConfigError` when there is none. Admitted nodes stay members."""
        entry = self._find(invite_id)
        if entry is None:
            raise ConfigError(f"there is no invite {invite_id.hex()}", "See `meshnode invites`.")
        return self._with(msgspec.structs.replace(entry, revoked=True), now)

    def forget(self, now: datetime) -> InviteBook:
        """With the keys of all finished invites deleted."""
        return InviteBook(tuple(_without_key(entry, now) for entry in self.entries))

    def _find(self, invite_id: bytes) -> InviteEntry | None:
        return next((e for e in self.entries if e.invite_id == invite_id), None)

    def _with(self, entry: InviteEntry, now: datetime) -> InviteBook:
        return InviteBook(tuple(entry if e.invite_id == entry.invite_id else e for e in self.entries)).forget(now)


def _without_key(entry: InviteEntry, now: datetime) -> InviteEntry:
    return entry if entry.state(now) is InviteState.OPEN else msgspec.structs.replace(entry, key=b"")


def check_terms(uses: int, life: timedelta) -> None:
    """`ConfigError` for what no invite may promise."""
    if not 1 <= uses <= MOST_USES:
        raise ConfigError(f"an invite admits 1 to {MOST_USES} machines, not {uses}")
    if not timedelta(0) < life <= LONGEST_LIFE:
        raise ConfigError(f"an invite expires within {LONGEST_LIFE.days} days")


def encode_book(book: InviteBook) -> bytes:
    """JSON, for the data directory; holds MAC keys: mode 0600."""
    return msgspec.json.format(msgspec.json.encode(book))


def decode_book(data: bytes) -> InviteBook:
    """Read back; `ConfigError` when the file is damaged."""
    try:
        return msgspec.json.decode(data, type=InviteBook)
    except (msgspec.DecodeError, ValueError) as problem:
        raise ConfigError(f"the file of invites is damaged ({type(problem).__name__})") from None


def new_entry(invite_id: bytes, key: bytes, role: Role, uses: int, life: tuple[datetime, datetime]) -> InviteEntry:
    """An open invite; `life` is (created, expires)."""
    created, expires = (moment.astimezone(UTC).replace(microsecond=0) for moment in life)
    return InviteEntry(invite_id, key, role, uses, created, expires)
