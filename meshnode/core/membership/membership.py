"""Who belongs to the mesh, as this node sees it: the one place where links, gossip and failure detection meet.

Invariant: whatever comes from an author without a valid, unrevoked chain is dropped before it is stored or passed on;
what is passed on is exactly its author's bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from meshnode.core.membership import orders as order
from meshnode.core.membership.announcement import Authority, Body, names_its_author
from meshnode.core.membership.detector import Detector
from meshnode.core.membership.digest import Digest, Item, id_of
from meshnode.core.membership.exchange import Exchange
from meshnode.core.membership.gossip import SMALL, Draw, Gossip, pick
from meshnode.core.membership.links import Links
from meshnode.core.membership.observers import Observers
from meshnode.core.membership.revocation import Revocations
from meshnode.core.membership.roster import MEMBERS, Entry, Roster
from meshnode.core.membership.rules import RULES, Rules
from meshnode.core.membership.standing import Standing
from meshnode.core.membership.suspicion import suspect
from meshnode.core.membership.voice import Voice
from meshnode.errors import PeerError
from meshnode.identity.ids import NodeId, short
from meshnode.wire.messages import (
    Announce,
    AnyMessage,
    Buckets,
    Have,
    Holding,
    Introduce,
    Leave,
    Ping,
    Pong,
    Probe,
    Probed,
    Revoke,
    Summary,
    Suspect,
    Want,
    WhoIs,
)

SYNC_S = 5.0
"""Anti-entropy with one linked peer (NETWORK)."""
LATE_S = 0.5
"""Woken so much later than asked for, this node was suspended or starved: its own slowness is suspected first."""
WHO_S = 1.0
"""Between two questions who an author is: an answer that took longer was lost with its link."""
ASKED_WHO = MEMBERS
"""Such questions remembered: one for every member there can be. Beyond, the oldest may be asked again sooner."""
HINTED = 2
"""Addresses of a hint that are tried before announced ones: false ones cost half a second of a dial."""
CHOOSE_S = 0.2
"""Between two choices of links above 16 nodes: each looks at all members, and they come and go together."""
HINTS = 64
"""Addresses of members that have not announced themselves: those of an invite, or of the last run."""

REVOKED = "its certificate was revoked"

MembershipMessage = (
    Introduce
    | Announce
    | Leave
    | Ping
    | Pong
    | WhoIs
    | Have
    | Want
    | Summary
    | Buckets
    | Holding
    | Suspect
    | Revoke
    | Probe
    | Probed
)


class Membership:
    """The members, the links to them, and this node's voice among them."""

    def __init__(self, authority: Authority, incarnation: int, draw: Draw, now: float, rules: Rules = RULES) -> None:
        self.authority = authority
        self.node = authority.node
        self.rules = rules
        self._draw = draw
        self.roster = Roster(authority, verify=rules.signatures)
        self.revocations = Revocations(authority)
        self.links = Links()
        self.hints: dict[NodeId, tuple[str, ...]] = {}
        self.digest = Digest()
        self.gossip = Gossip(draw, self.digest.items)
        self.ring = Observers()
        self.voice = Voice(authority, incarnation, draw, now)
        self.exchange = Exchange(self.roster, self.voice, self.digest, self.gossip)
        self.standing = Standing(self.roster, self.links, self.ring, draw)
        self.detector = Detector(self.roster, self.links, self.ring, draw, now)
        self._orders: list[order.MembershipOrder] = []
        self._asked_who: dict[NodeId, float] = {}
        self._choose = False
        self._choose_at = now
        self._own_id: bytes | None = None
        self._judged = NodeId("")
        self._expected: float | None = None
        self._sync_at = now + SYNC_S * int.from_bytes(draw(2), "big") / 65536
        if authority.admit(authority.chain).role == "member":
            self.ring.add(self.node)

    def take(self) -> Sequence[order.MembershipOrder]:
        """What has to be done since the last call."""
        if not self._orders:
            return ()
        orders, self._orders = self._orders, []
        return orders

    # --- events -----------------------------------------------------------------------------------------------

    def found(self, node: NodeId, addresses: tuple[str, ...], now: float) -> None:
        """Where a member may be that has not announced itself yet, or has moved since."""
        if node == self.node or self.revocations.expelled(node):
            return
        entry, link = self.roster.entries.get(node), self.links.links.get(node)
        if entry is not None and (entry.left or set(addresses) <= set(entry.body.addresses)):
            return
        if entry is not None and entry.present and (link is None or not link.wanted):
            return  # above 16 nodes others keep the link, or nearly every node would hint at every other
        if node not in self.hints and len(self.hints) >= HINTS:
            del self.hints[next(iter(self.hints))]
        self.hints[node] = addresses
        self.links.want(node, now)
        self._choose = True

    def addresses_of(self, node: NodeId) -> tuple[str, ...]:
        """Where to dial `node`: what it announced, and before that where it was seen since (anybody may say that)."""
        entry, hint = self.roster.entries.get(node), self.hints.get(node, ())
        return hint if entry is None else tuple(dict.fromkeys((*hint[:HINTED], *entry.body.addresses)))

    def keep_links_to(self, partners: frozenset[NodeId]) -> None:
        """Nodes of the runs that this node takes part in."""
        if self.revocations.records:
            partners = frozenset(node for node in partners if not self.revocations.expelled(node))
        if partners != self.standing.partners:
            self.standing.partners = partners
            self._choose = True

    def link_opened(self, peer: NodeId, now: float) -> None:
        """A link is authenticated: say who we are, and compare what we know."""
        self.links.opened(peer, now)
        if peer in self.roster.entries:
            self.hints.pop(peer, None)  # it was reached, and tells anew where it is
        if self.barred(peer):
            self._orders.append(order.Drop(peer, REVOKED))
            return
        if self.voice.record is not None:
            self._tell(peer, Introduce(self.authority.chain))
            self._tell(peer, self.voice.record)
        if self.rules.anti_entropy and self.node < peer:
            self._tell(peer, self.exchange.summary())

    def link_closed(self, peer: NodeId, reason: str, now: float, *, barred: bool = False) -> bool:
        """A link ended or a dial failed (`barred`: it says that this node was revoked); False: nobody wants it."""
        if peer not in self.links.links:
            return False  # it left: nobody dials it until it is heard of again
        self.links.closed(peer, reason, now, barred=barred)
        return True

    def received(self, peer: NodeId, message: MembershipMessage, now: float) -> None:
        """One message of a linked peer. Raises PeerError for what no honest node sends."""
        match message:
            case Ping():
                self._tell(peer, Pong(message.nonce))
            case Pong():
                self.links.pong(peer, message.nonce, now)
            case Have() | Want() | WhoIs() | Summary() | Buckets() | Holding():
                for answer in self.exchange.answer(peer, message, now):
                    self._tell(peer, answer)
            case Introduce():
                self._introduced(message.chain)
            case Announce():
                self._announced(peer, message, now)
            case Leave():
                # That it left is what its signed last word says, which came before this. A goodbye of an earlier life,
                # held up on its way, says nothing of the present one.
                self._forget(peer, "the node left")
                self._choose = True
            case Suspect():
                self._suspected(peer, message, now)
            case Probe():
                answered = self.detector.question(peer, message, now)
                if answered is not None:
                    self._tell(peer, answered)
            case Probed():
                self.detector.probed(peer, message, now)
            case Revoke():
                self.revoke(peer, message, now)
            case _:
                assert_never(message)

    def _introduced(self, chain: tuple[bytes, ...]) -> None:
        node = self.roster.introduce(chain)
        if self.barred(node):
            self._remove(node)
        else:
            self.revocations.readmit(node)

    def _announced(self, peer: NodeId, record: Announce, now: float) -> None:
        author = record.author
        if author == self.node:
            if self.voice.heard_itself(record, now, verify=self.rules.signatures):
                self._orders.append(order.Noted(self.voice.alarm or "this node's numbers were used before: going on"))
            return
        if self.barred(author):
            if names_its_author(
                record
            ):  # nobody looks at its signature, and the id of another's word must not be hidden
                self.gossip.saw(id_of(record))
            for revoked in self.revocations.records.values():
                self._tell(peer, revoked)
            return
        if author not in self.roster.authors:
            self._ask_who(peer, author, now)
            return
        before = self.roster.entries.get(author)
        if not self.roster.offer(record, now):
            self.gossip.saw(id_of(record))
            return
        if not self.roster.current(author):
            self._ask_who(peer, author, now)
        self._adopted(peer, before, self.roster.entries[author], now)

    def _ask_who(self, peer: NodeId, author: NodeId, now: float) -> None:
        if now - self._asked_who.get(author, now - WHO_S) >= WHO_S:
            self._asked_who.pop(author, None)
            self._asked_who[author] = now
            if len(self._asked_who) > ASKED_WHO:
                del self._asked_who[next(iter(self._asked_who))]
            self._tell(peer, WhoIs((author,)))

    def _adopted(self, peer: NodeId, before: Entry | None, entry: Entry, now: float) -> None:
        author = entry.body.node
        if before is not None:
            self.digest.remove(before.identity)
            if before.body.incarnation < entry.body.incarnation:
                self._orders.append(order.Lost(author, f"{before.body.name} was restarted"))
        self._refuted(author)
        self.digest.add(entry.record)
        # Who heard it from others names it to its author too: that is how two machines with one key meet.
        self.gossip.spread(entry.identity, self.standing.size, {peer}, now)
        self.hints.pop(author, None)
        if entry.left:
            self._gone(author, "the node left")
            return
        if before is None or not before.present:
            self._choose = True
            if self.roster.authors[author].role == "member":
                self.ring.add(author)
        self._orders.append(order.Changed())

    def _gone(self, node: NodeId, reason: str) -> None:
        """It is not there any more, by its own word or by that of its observers."""
        self.ring.remove(node)
        self._choose = True
        entry = self.roster.entries.get(node)
        if entry is not None and entry.left:
            self._forget(node, reason)
        self._orders += [order.Lost(node, reason), order.Changed()]

    # --- revocation -------------------------------------------------------------------------------------------

    def revoke(self, peer: NodeId, record: Revoke, now: float) -> None:
        """Take a list, of a peer or (`peer` is this node) of the issuer here. Raises PeerError."""
        news, before = self.revocations.offer(record)
        if before is not None:
            self.digest.remove(id_of(before))
        if not news:
            self.gossip.saw(id_of(record))
            return
        self.gossip.spread(self.digest.add(record), self.standing.size, {peer}, now)
        for node in [*self.roster.authors, *self.links.links]:
            if self.barred(node):
                self._remove(node)
        # Behind the closing of links, which needs no durability and must happen on a full disk too.
        self._orders.append(order.Keep(self.revocations.encode()))

    def restore(self, revocations: bytes) -> None:
        """Lists that were kept on disk. Raises ConfigError."""
        self.revocations.restore(revocations)
        for record in self.revocations.records.values():
            self.gossip.saw(self.digest.add(record))

    def barred(self, node: NodeId) -> bool:
        """Whether its certificate, or its issuer's, was revoked."""
        return self.revocations.bars(node, self.roster.authors.get(node))

    def _remove(self, node: NodeId, reason: str = REVOKED) -> None:
        self.revocations.expel(node, self.roster.authors.get(node))
        entry = self.roster.entries.get(node)
        if entry is not None:
            self.digest.remove(entry.identity)
        for record in self.detector.clear(node):
            self.digest.remove(id_of(record))
        self.roster.remove(node)
        self.hints.pop(node, None)
        self._forget(node, reason)
        self._gone(node, reason)

    def _forget(self, node: NodeId, reason: str) -> None:
        """Never dial it again; a link that is forgotten is closed too, or nobody would know to close it later."""
        if self.links.up(node):
            self._orders.append(order.Drop(node, reason))
        self.links.forget(node)

    # --- suspicion --------------------------------------------------------------------------------------------

    def _suspected(self, peer: NodeId, record: Suspect, now: float) -> None:
        told = self.detector.read(record, verify=self.rules.signatures)
        if told is None:
            return
        if told.target == self.node:
            self.gossip.saw(id_of(record))
            body = self.voice.body
            if self.rules.refutation and body is not None and told.number >= body.number:
                self.voice.soon(now, settle=0.0)
            return
        news, before = self.detector.hear(record, told, now)
        if before is not None:
            self.digest.remove(id_of(before))
        if news:
            self.gossip.spread(self.digest.add(record), self.standing.size, {peer}, now)

    def _refuted(self, node: NodeId) -> None:
        for record in self.detector.clear(node):
            self.digest.remove(id_of(record))

    def _detect(self, now: float) -> None:
        probes, suspicions = self.detector.check(self.standing.watched, now)
        for peer, probe in probes:
            self._tell(peer, probe)
        for peer, answer in self.detector.answers(now):
            self._tell(peer, answer)
        for suspicion in suspicions:
            self._suspected(self.node, suspect(suspicion, self.authority), now)
        for node in self.detector.verdicts(now):
            self.roster.bury(node)
            self._orders.append(order.Drop(node, "its observers agree that it is dead"))
            self._gone(node, f"{self.name_of(node)} is dead")

    # --- speaking ---------------------------------------------------------------------------------------------

    def speak(self, body: Body, now: float) -> None:
        """Announce `body`, numbered and signed here."""
        record = self.voice.speak(body, now)
        self._hold_own(record)
        linked = self.links.linked()
        for peer in linked:
            self._tell(peer, record)
        self.gossip.spread(id_of(record), self.standing.size, set(linked), now)

    def _hold_own(self, record: Item) -> None:
        if self._own_id is not None:
            self.digest.remove(self._own_id)
        self._own_id = self.digest.add(record)

    # --- what others pass through here ------------------------------------------------------------------------

    def hold(self, item: Item, before: Item | None, told: set[NodeId], now: float) -> None:
        """Pass `item` on from now on, in the place of `before`; `told` have it."""
        self.let_go(before)
        self.gossip.spread(self.digest.add(item), self.standing.size, told, now)

    def let_go(self, item: Item | None) -> None:
        """Pass it on no longer."""
        if item is not None:
            self.digest.remove(id_of(item))

    def keep(self, item: Item) -> None:
        """Have it, as from before the start: who lacks it will ask."""
        self.gossip.saw(self.digest.add(item))

    # --- every time -------------------------------------------------------------------------------------------

    def awoke(self, now: float) -> None:
        """Before anything is judged at `now`: where this node did not run for a while (suspended, starved, or waiting
        for its disk), what others said meanwhile still waits to be read, and nobody counts as silent for it."""
        if self._expected is not None and now > self._expected + LATE_S:
            self._expected = now  # once for each time: what waited is read one by one
            self.links.awoke(now)
            self.detector.slept(now)

    def settle(self, now: float) -> None:
        """What follows from any event, and what is due."""
        if self.detector.check_at <= now:
            self._detect(now)
        if self._sync_at <= now:
            self._sync(now)
        if self._choose and self._choose_at <= now:
            self._choose = False
            for peer in self.standing.choose(self.hints, now):
                self._orders.append(order.Drop(peer, "not needed any more"))
            self._choose_at = now + (CHOOSE_S if self.standing.size > SMALL else 0.0)
        told = self.gossip.deadline()
        if told is not None and told <= now:
            self._gossip(now)
        if self.links.is_due(now):
            self._links_due(now)

    def _gossip(self, now: float) -> None:
        for peer, identity in self.gossip.retries(now):
            self._tell(peer, Want((identity,)))
        for peer, ids in self.gossip.round(self.links.linked(), self.standing.size, now):
            self._tell(peer, Have(ids))

    def _links_due(self, now: float) -> None:
        for peer in self.links.silent(now):
            self._orders.append(order.Drop(peer, "no word for too long"))
        for peer in self.links.unended(now):
            self.links.closed(peer, "no word for too long", now)
        for peer in self.links.given_up(now):
            self._orders.append(order.Lost(peer, f"the link to {self.name_of(peer)} was lost"))
        for link in list(self.links.dials(now)):
            self._orders.append(order.Dial(link.node))
        for link in self.links.pings(now):
            self._tell(link.node, Ping(link.ping_nonce))

    def _sync(self, now: float) -> None:
        self._sync_at = now + SYNC_S
        for node in self.roster.expire(now):
            self.digest.remove(self.roster.entries[node].identity)
            self._refuted(node)
            if node in self.ring:
                self._gone(node, f"{self.name_of(node)} was not heard of for too long")
        for node in self.roster.forget(now):
            self._forget(node, "it was not heard of for a day")
        self._judge_again()
        self._asked_who = {node: at for node, at in self._asked_who.items() if now - at < WHO_S}
        self.standing.seek()
        self._choose = self._choose or self.standing.size > SMALL or self.standing.size == 1
        if self.rules.anti_entropy:
            for peer in pick(self._draw, self.links.linked(), 1):
                self._tell(peer, self.exchange.summary())

    def _judge_again(self) -> None:
        """One author each time: certificates end while their authors are known (within 45 min of 512 authors)."""
        authors = sorted(self.roster.chains)
        node = next((each for each in authors if each > self._judged), authors[0] if authors else None)
        if node is None:
            return
        self._judged = node
        try:
            self.authority.admit(self.roster.chains[node])
        except PeerError as error:
            self._remove(node, str(error))

    def deadline(self) -> float:
        """When `settle` is due next."""
        due = min(self._sync_at, self.detector.check_at)
        if self._choose and self._choose_at < due:
            due = self._choose_at
        for at in (self.links.deadline(), self.gossip.deadline()):
            if at is not None and at < due:
                due = at
        self._expected = due
        return due

    def name_of(self, node: NodeId) -> str:
        """What a person called it."""
        entry = self.roster.entries.get(node)
        return entry.body.name if entry is not None and not entry.left else short(node)

    def _tell(self, peer: NodeId, message: AnyMessage) -> None:
        self._orders.append(order.Tell(peer, message))
