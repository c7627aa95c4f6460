"""Machines that paste one invite at the same time, while answers are lost, the issuer crashes and its disk is slow.

The book is the real one (identity/invite_book), and the desk keeps the order of io/transport/join_desk: redeem, write,
sign, write, answer. A joiner that got no answer asks again with the same key.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

from meshnode.identity.certificates import Role
from meshnode.identity.invite_book import InviteBook, InviteEntry, JoinRefusal, decode_book, encode_book, new_entry
from meshnode.identity.invites import INVITE_ID_BYTES, SECRET_BYTES, invite_key
from meshnode.identity.keys import spki_of
from meshnode.identity.transcript import NONCE_BYTES, Transcript, fingerprint
from sim.agenda import stream
from sim.keys import BEGIN, private_key

if TYPE_CHECKING:
    from sim.machine import Machine
    from sim.world import World

LOST = 0.15
"""Of requests, and of answers."""
AGAIN_S = (1.0, 4.0)
AIMED = 0.3
"""How often the issuer crashes while a request is being written."""
LIFE = timedelta(days=1)


@dataclass
class Joiner:
    """One machine with an invite; it is no member yet."""

    name: str
    invite_id: bytes
    secret: bytes
    answer: bytes | JoinRefusal | None = None


@dataclass(frozen=True)
class Asked:
    """A joiner's proof, as it comes to the desk."""

    joiner: Joiner
    transcript: Transcript
    mac: bytes
    signature: bytes


@dataclass
class Race:
    """One invite and all who paste it."""

    uses: int
    joiners: list[Joiner]


@dataclass
class Desk:
    """The issuer's side; what it knows beside its disk lasts as long as a life of its node."""

    world: World
    machine: Machine
    book: InviteBook = field(default_factory=InviteBook)
    life: int = -1
    waiting: deque[Asked] = field(default_factory=deque)
    busy: bool = False

    def read(self) -> None:
        """In a new life only the disk is known."""
        if self.life != self.machine.life:
            kept = self.machine.disk.invites
            self.book = decode_book(kept) if kept else InviteBook()
            self.life, self.busy = self.machine.life, False
            self.waiting.clear()

    def arrived(self, asked: Asked) -> None:
        """A request came over its own connection; one after the other is answered."""
        if self.machine.mediator is None or self.machine.paused:
            return
        self.read()
        self.waiting.append(asked)
        self._next()

    def _next(self) -> None:
        if self.busy or not self.waiting:
            return
        self.busy = True
        asked = self.waiting.popleft()
        asked.transcript.check_signature(asked.signature)
        book, answer = self.book.redeem(asked.transcript, asked.mac, self._now())
        self.keep(book, lambda: self._redeemed(asked, answer))

    def _redeemed(self, asked: Asked, answer: InviteEntry | JoinRefusal) -> None:
        key = asked.transcript.public_key
        if isinstance(answer, JoinRefusal):
            self._answer(asked, answer)
            return
        known = next(a.certificate for a in answer.admitted if a.public_key == key)
        if known:
            self._answer(asked, known)
            return
        certificate = self.world.mint.member(asked.joiner.name, lambda: 0.0).chain[0]
        self.world.checks.admitted(self.machine, answer, key)
        book = self.book.certified(answer.invite_id, key, certificate, self._now())
        self.keep(book, lambda: self._answer(asked, certificate))

    def _answer(self, asked: Asked, answer: bytes | JoinRefusal) -> None:
        self.busy = False
        self.world.invites.answered(asked.joiner, answer)
        self._next()

    def keep(self, book: InviteBook, then: Callable[[], None]) -> None:
        """Make `book` durable, then go on; on a full disk the connection breaks."""
        if book == self.book:
            then()
            return
        disk = self.machine.disk
        if disk.full:
            self.busy = False
            return

        def write() -> None:
            disk.invites = encode_book(book)

        def written() -> None:
            write()
            self.book = book
            then()

        if self.world.invites.random.random() < 0.5:  # a crash may come before or after the rename
            self.machine.after(0.0, write)
        self.machine.after(disk.write_s, written)

    def _now(self) -> datetime:
        return BEGIN + timedelta(seconds=int(self.world.now))


class Invites:
    """All invites of one world; the first machine is the issuer."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.random = stream(world.seed, "invites")
        self.races: list[Race] = []
        self.desk: Desk | None = None
        self.aims = True

    def invite(self, issuer: Machine, uses: int, rivals: int) -> None:
        """Somebody makes an invite and gives it to `rivals` machines, more than it admits."""
        if self.desk is None:
            self.desk = Desk(self.world, issuer)
        self.desk.read()
        if self.desk.busy:  # who changes the book waits for whoever does
            self.world.agenda.after(issuer.disk.write_s, partial(self.invite, issuer, uses, rivals))
            return
        number = len(self.races)
        secret, invite_id = self.random.randbytes(SECRET_BYTES), self.random.randbytes(INVITE_ID_BYTES)
        now = BEGIN + timedelta(seconds=int(self.world.now))
        entry = new_entry(invite_id, invite_key(secret, invite_id), Role.MEMBER, uses, (now, now + LIFE))
        self.desk.book = self.desk.book.create(entry)
        issuer.disk.invites = encode_book(self.desk.book)  # a person waits until it is
        race = Race(uses, [Joiner(f"j{number}.{rival}", invite_id, secret) for rival in range(rivals)])
        self.races.append(race)
        for joiner in race.joiners:
            self.world.agenda.after(self.random.uniform(0.0, 1.0), partial(self._ask, joiner))

    def _ask(self, joiner: Joiner) -> None:
        assert self.desk is not None
        if joiner.answer is not None:
            return
        delay = self.random.uniform(*self.world.profile.latency_s) * 3
        if self.random.random() >= LOST:
            asked, desk = self._proof(joiner), self.desk
            self.world.agenda.after(delay, lambda: desk.arrived(asked))
            if self.aims and self.random.random() < AIMED:
                self._aim(delay + self.random.uniform(0.0, 2 * desk.machine.disk.write_s))
        self.world.agenda.after(self.random.uniform(*AGAIN_S), lambda: self._ask(joiner))

    def _aim(self, delay: float) -> None:
        """The issuer's node dies about when it writes, and comes back."""
        assert self.desk is not None
        issuer = self.desk.machine

        def crash() -> None:
            if self.aims and issuer.mediator is not None:
                self.world.note_fault(f"{issuer.name} crashes while somebody joins")
                issuer.crash(power=False)
                self.world.agenda.after(1.0, lambda: issuer.start() if issuer.mediator is None else None)

        self.world.agenda.after(delay, crash)

    def _proof(self, joiner: Joiner) -> Asked:
        mint, key = self.world.mint, private_key(self.world.seed, "node", joiner.name)
        nonces = self.random.randbytes(NONCE_BYTES), self.random.randbytes(NONCE_BYTES)
        leaf = fingerprint(hashlib.sha256(mint.mesh.encode()).digest())
        transcript = Transcript(mint.mesh, joiner.invite_id, *nonces, leaf, spki_of(key.public_key()))
        mac = transcript.mac(invite_key(joiner.secret, joiner.invite_id))
        return Asked(joiner, transcript, mac, transcript.sign(key))

    def answered(self, joiner: Joiner, answer: bytes | JoinRefusal) -> None:
        """The desk's answer is on its way to `joiner`, or lost."""
        if self.random.random() < LOST or joiner.answer is not None:
            return
        joiner.answer = answer
        if isinstance(answer, bytes):
            self._enter(joiner)

    def _enter(self, joiner: Joiner) -> None:
        assert self.desk is not None
        issuer = self.desk.machine
        machine = self.world.add(joiner.name)
        self.world.note_fault(f"{joiner.name} joins by invite")
        machine.disk.peers[issuer.node] = issuer.me.addresses
        machine.start()

    def open(self) -> list[str]:
        """Who waits for an answer still, and invites that did not admit as many as they should."""
        found = [f"{j.name} waits for an answer" for race in self.races for j in race.joiners if j.answer is None]
        for race in self.races:
            admitted = sum(isinstance(joiner.answer, bytes) for joiner in race.joiners)
            if not found and admitted != min(race.uses, len(race.joiners)):
                found.append(f"an invite for {race.uses} admitted {admitted} of {len(race.joiners)}")
        return found
