"""Failure detection: observers ping, ask others, suspect, and agree; the suspect refutes by a higher number.

    quiet 2 s (two missed pings) -> two others are asked -> nobody reaches it: signed suspicion
    -> enough observers agree for 3 s: dead.   Somebody reaches it: "unreachable from me", no suspicion.

Invariant: one observer alone declares nobody dead unless it waited 8 s and nobody it could ask reached the node
either; whatever keeps this node itself from hearing (a pause, a slow machine) makes it wait longer first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meshnode.core.membership import suspicion as text
from meshnode.core.membership.gossip import Draw, pick
from meshnode.core.membership.links import Links
from meshnode.core.membership.observers import Observers
from meshnode.core.membership.roster import Roster
from meshnode.core.membership.suspicion import Suspicion
from meshnode.identity.ids import NodeId
from meshnode.wire.messages import Probe, Probed, Suspect

CHECK_S = 0.5
QUIET_S = 1.5
"""One ping that is due and one that was missed; the timeout of the second, 0.5 s x local health, comes on top."""
TIMEOUT_S = 0.5
HEALTH_MAX = 8
PROBE_S = 1.0
"""Two more round trips, and one retransmission of each."""
FRESH_S = 1.2
"""A peer heard of so recently is vouched for without asking it."""
AGREE_S = 3.0
"""From the first suspicion to the verdict: the suspect hears of it and answers within 2 s at 256 nodes."""
ALONE_S = 8.0
ASKED = 2
PROBES_HELD = 64
"""Questions of others under way: eight observers ask about eight nodes."""


@dataclass(frozen=True)
class Vote:
    """One observer's suspicion, as it is passed on."""

    record: Suspect
    number: tuple[int, int]
    alone: bool


@dataclass
class Probing:
    """What others were asked about a quiet node."""

    nonce: int
    since: float
    asked: frozenset[NodeId]
    denied: set[NodeId] = field(default_factory=set)


@dataclass(frozen=True)
class Question:
    """What another asked this node, until the answer is known."""

    peer: NodeId
    nonce: int
    target: NodeId
    since: float


class Detector:
    """This node as an observer, and as one that hears of other observers' suspicions."""

    def __init__(self, roster: Roster, links: Links, ring: Observers, draw: Draw, now: float) -> None:
        self._roster = roster
        self._links = links
        self._ring = ring
        self._draw = draw
        self.health = 1
        self.votes: dict[NodeId, dict[NodeId, Vote]] = {}
        self._first: dict[NodeId, float] = {}
        self._since: dict[NodeId, float] = {}
        self._probing: dict[NodeId, Probing] = {}
        self._questions: list[Question] = []
        self._nonce = 0
        self._awake_at = now
        self.check_at = now + CHECK_S

    def slept(self, now: float) -> None:
        """This node did not run for a while: what it did not hear is nobody else's fault."""
        self._awake_at = now
        self.health = min(self.health + 1, HEALTH_MAX)

    def quiet(self, node: NodeId, now: float) -> float:
        """Seconds without a word of `node` or for it."""
        link = self._links.links.get(node)
        heard = link.heard_at if link is not None else self._awake_at
        return now - max(heard, self._since.get(node, now), self._awake_at)

    # --- observing --------------------------------------------------------------------------------------------

    def check(self, watched: list[NodeId], now: float) -> tuple[list[tuple[NodeId, Probe]], list[Suspicion]]:
        """Whom to ask about whom, and what to suspect now."""
        self.check_at = now + CHECK_S
        self._since = {node: self._since.get(node, now) for node in watched}
        self._probing = {node: probing for node, probing in self._probing.items() if node in self._since}
        silent = [node for node in watched if self.quiet(node, now) > QUIET_S]
        if len(silent) >= 2 and 2 * len(silent) >= len(watched):
            self.health = min(self.health + 1, HEALTH_MAX)
        elif not silent and now - self._awake_at > QUIET_S:
            self.health = max(self.health - 1, 1)
        probes: list[tuple[NodeId, Probe]] = []
        suspicions: list[Suspicion] = []
        for node in silent:
            entry = self._roster.entries.get(node)
            if entry is None or not entry.present or self.quiet(node, now) < QUIET_S + TIMEOUT_S * self.health:
                continue
            verdict = self._doubt(node, probes, now)
            if verdict is not None:
                suspicions.append(self._suspicion(node, *entry.body.number, alone=verdict))
        return probes, suspicions

    def _doubt(self, node: NodeId, probes: list[tuple[NodeId, Probe]], now: float) -> bool | None:
        """None: no suspicion yet, or nothing new to say; else whether it stands alone."""
        probing = self._probing.get(node)
        if probing is None or now - probing.since > 2 * PROBE_S:
            kept = probing.denied if probing is not None else set()
            probing = self._probing[node] = self._ask(node, probes, now)
            probing.denied |= kept
        if probing.asked and now - probing.since < PROBE_S and not probing.asked <= probing.denied:
            return None
        own = self.votes.get(node, {}).get(self._roster.authority.node)
        waited = self.quiet(node, now) >= ALONE_S + TIMEOUT_S * (self.health - 1)
        alone = waited and len(probing.denied) >= min(ASKED, len(probing.asked))
        return alone if own is None or (alone and not own.alone) else None

    def _ask(self, node: NodeId, probes: list[tuple[NodeId, Probe]], now: float) -> Probing:
        self._nonce += 1
        fellows = [each for each in self._ring.of(node) if self._hears(each, node, now)]
        others = [each for each in self._links.links if each not in fellows and self._hears(each, node, now)]
        asked = fellows[:ASKED]
        asked += pick(self._draw, others, ASKED - len(asked))
        probes += [(peer, Probe(node, self._nonce)) for peer in asked]
        return Probing(self._nonce, now, frozenset(asked))

    def _hears(self, peer: NodeId, target: NodeId, now: float) -> bool:
        link = self._links.links.get(peer)
        return peer != target and link is not None and link.up and now - link.heard_at < 2 * ALONE_S

    def _suspicion(self, target: NodeId, incarnation: int, sequence: int, *, alone: bool) -> Suspicion:
        authority = self._roster.authority
        return Suspicion(authority.mesh, authority.node, target, incarnation, sequence, alone)

    def probed(self, peer: NodeId, answer: Probed, now: float) -> None:
        """Somebody whom this node asked answers."""
        for node, probing in list(self._probing.items()):
            if probing.nonce == answer.nonce and peer in probing.asked:
                if answer.reached:
                    self._since[node] = now
                    del self._probing[node]
                else:
                    probing.denied.add(peer)

    # --- answering --------------------------------------------------------------------------------------------

    def question(self, peer: NodeId, probe: Probe, now: float) -> Probed | None:
        """`peer` asks whether this node reaches another; None when that is found out first, or never."""
        link = self._links.links.get(probe.target)
        if link is None:
            return None
        if not link.up:
            return Probed(probe.nonce, False) if link.failures or link.lost_at is not None else None
        if now - link.heard_at < FRESH_S:
            return Probed(probe.nonce, True)
        link.ping_at = now
        self._links.touch()
        self._questions = [*self._questions[-PROBES_HELD:], Question(peer, probe.nonce, probe.target, now)]
        return None

    def answers(self, now: float) -> list[tuple[NodeId, Probed]]:
        """What is known by now of what others asked."""
        told, open_ = [], []
        for asked in self._questions:
            link = self._links.links.get(asked.target)
            reached = link is not None and link.up and link.heard_at > asked.since
            if reached or now - asked.since >= PROBE_S - CHECK_S / 2:
                told.append((asked.peer, Probed(asked.nonce, reached)))
            else:
                open_.append(asked)
        self._questions = open_
        return told

    # --- agreeing ---------------------------------------------------------------------------------------------

    def read(self, record: Suspect, *, verify: bool) -> Suspicion | None:
        """What `record` says; None when its author is not known here. Raises PeerError."""
        authority = self._roster.authority
        author = self._roster.authors.get(record.author)
        if record.author == authority.node:
            author = authority.admit(authority.chain)
        return None if author is None else text.read(record, author, authority.mesh, verify=verify)

    def hear(self, record: Suspect, told: Suspicion, now: float) -> tuple[bool, Suspect | None]:
        """Whether a suspicion is news, and the one of the same observer that it replaces."""
        entry = self._roster.entries.get(told.target)
        if entry is None or told.number != entry.body.number or entry.left or entry.expired:
            return False, None
        if not self._ring.believed(told.author, told.target):
            return False, None
        votes = self.votes.setdefault(told.target, {})
        before = votes.get(told.author)
        if before is not None and (before.alone or not told.alone):
            return False, None
        votes[told.author] = Vote(record, told.number, told.alone)
        self._first.setdefault(told.target, now)
        return True, None if before is None else before.record

    def clear(self, node: NodeId) -> list[Suspect]:
        """The suspicions against `node` are over; what was passed on of them."""
        self._first.pop(node, None)
        self._probing.pop(node, None)
        return [vote.record for vote in self.votes.pop(node, {}).values()]

    def verdicts(self, now: float) -> list[NodeId]:
        """Those on whose death enough observers agree."""
        observers = self._ring.count()
        needed = max(2, -(-observers // 2))
        dead = []
        for node, votes in self.votes.items():
            entry = self._roster.entries.get(node)
            if entry is None or not entry.present or now - self._first[node] < AGREE_S:
                continue
            if len(votes) >= needed or any(vote.alone for vote in votes.values()):
                dead.append(node)
        return dead

    def suspected(self, node: NodeId) -> bool:
        """Whether anybody doubts it."""
        return bool(self.votes.get(node))
