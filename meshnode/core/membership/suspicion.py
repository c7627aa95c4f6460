"""What an observer says of a member that does not answer: signed, and bound to one announcement of that member.

Invariant: a suspicion counts only against the number that it names; any later announcement refutes it.
"""

from __future__ import annotations

import msgspec

from meshnode.core.membership.announcement import Author, Authority
from meshnode.errors import PeerError
from meshnode.identity.domains import Domain
from meshnode.identity.ids import MeshId, NodeId
from meshnode.wire.messages import Suspect

SUSPICION_BYTES = 512
"""Three ids of 52 letters and two numbers take 260."""


class Suspicion(msgspec.Struct, frozen=True):
    """The signed content."""

    mesh: MeshId
    author: NodeId
    target: NodeId
    incarnation: int
    sequence: int
    """Of the announcement of `target` that is doubted."""
    alone: bool = False
    """The author waited 8 s, and nobody whom it asked could reach `target` either."""

    @property
    def number(self) -> tuple[int, int]:
        """What a later announcement exceeds."""
        return (self.incarnation, self.sequence)


def suspect(suspicion: Suspicion, authority: Authority) -> Suspect:
    """The signed record of `suspicion`."""
    raw = msgspec.msgpack.encode(suspicion)
    return Suspect(suspicion.author, raw, authority.sign(Domain.SUSPICION, raw))


def read(record: Suspect, author: Author, mesh: MeshId, *, verify: bool = True) -> Suspicion:
    """The checked content. Raises PeerError for anything that a member of this mesh did not sign."""
    if author.role != "member":
        raise PeerError("only members may suspect")
    if len(record.body) > SUSPICION_BYTES:
        raise PeerError("an oversized suspicion")
    if verify and not author.signed(Domain.SUSPICION, record.body, record.signature):
        raise PeerError("a suspicion with a wrong signature")
    try:
        suspicion = msgspec.msgpack.decode(record.body, type=Suspicion)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PeerError(f"a malformed suspicion: {error}") from None
    if suspicion.author != record.author or suspicion.author != author.node or suspicion.mesh != mesh:
        raise PeerError("a suspicion in another node's name or mesh")
    return suspicion
