"""What every member offers, as the planner sees it: this node by its own knowledge, the others by their signed word.

Invariant: a peer's announcement decides about that peer and the ways to it, never about a third node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnode.core.membership.announcement import Speed, Way
from meshnode.core.membership.roster import Entry
from meshnode.core.node import announcing
from meshnode.core.planning.inventory import Inventory, LinkInventory, NodeInventory
from meshnode.identity.ids import NodeId

if TYPE_CHECKING:
    from meshnode.core.node.mediator import Mediator

USUAL = "q8_0"
"""The kind of weights whose speed stands for one that nothing is known of: of those measured it is the middle one."""
FEW_BITS = "q4_k"
"""The one that stands for other kinds of six bits and fewer: they unpack their blocks in the same way."""
HALVES = "f16"
"""The one that stands for weights that are not packed."""


def inventory_of(mediator: Mediator, deployment: str, kind: str) -> Inventory:
    """Every member as the planner may use it for `deployment`, whose weights are of `kind`."""
    speed = speed_of(announcing.speeds(mediator.speeds), kind)
    own = NodeInventory(
        mediator.node,
        mediator.me.name,
        mediator.me.memory_usable - without_this(mediator.ledger.reserved, deployment),
        cores=mediator.me.cores,
        cached=announcing.artifacts(mediator.cached),
        decode_bytes_per_s=speed.decode_bytes_per_s,
        prefill_bytes_per_s=speed.prefill_bytes_per_s,
        layer_us=speed.layer_us,
        stage_us=speed.stage_us,
        # Whose key was copied is left out by everybody, itself included (rules of the announcement).
        excluded="draining" if mediator.draining else "unreachable" if mediator.membership.voice.alarm else "",
    )
    entries = mediator.roster.entries
    others = [_peer(mediator, node, entry, deployment, kind) for node, entry in entries.items()]
    told = {node: entry.body.ways for node, entry in entries.items()}
    told[mediator.node] = announcing.ways(mediator.ways)
    return Inventory((own, *others), links_of(told))


def _peer(mediator: Mediator, node: NodeId, entry: Entry, deployment: str, kind: str) -> NodeInventory:
    body, excluded = entry.body, ""
    if mediator.roster.authors[node].role != "member":
        excluded = "client"
    elif entry.left:
        excluded = "left"
    elif body.draining:
        excluded = "draining"
    elif not mediator.reachable(node) or node in mediator.roster.conflicts:
        excluded = "unreachable"
    elif body.llama != mediator.me.llama:
        excluded = "incompatible"
    taken = without_this({held.deployment: held.bytes for held in body.reserved}, deployment)
    speed = speed_of(body.speeds, kind)
    return NodeInventory(
        node,
        body.name,
        max(0, body.memory_usable - taken),
        cores=body.cores,
        cached=announcing.artifacts(body.cached),
        decode_bytes_per_s=speed.decode_bytes_per_s,
        prefill_bytes_per_s=speed.prefill_bytes_per_s,
        layer_us=speed.layer_us,
        stage_us=speed.stage_us,
        excluded=excluded,
    )


def speed_of(speeds: dict[str, Speed], kind: str) -> Speed:
    """Of `kind`; where that was not measured, of one like it; where nothing was, unknown."""
    like = FEW_BITS if kind.startswith(("q", "iq", "tq")) else HALVES if kind in ("bf16", "f32") else USUAL
    return speeds.get(kind) or speeds.get(like) or speeds.get(USUAL) or Speed()


def links_of(told: dict[NodeId, dict[NodeId, Way]]) -> tuple[LinkInventory, ...]:
    """Ways by author and source -> directed links between members. A round trip that one end did not measure is the
    other end's: it is the same one."""
    found = []
    for target, ways in sorted(told.items()):
        for source, way in sorted(ways.items()):
            if source in told and source != target:
                found.append(LinkInventory(source, target, way.rtt_us, way.bytes_per_s))
                if target not in told[source]:
                    found.append(LinkInventory(target, source, way.rtt_us, 0))
    return tuple(found)


def without_this(reserved: dict[str, int], deployment: str) -> int:
    """Bytes that other deployments than `deployment` hold."""
    return sum(size for name, size in reserved.items() if name != deployment)
