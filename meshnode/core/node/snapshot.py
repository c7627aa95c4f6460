"""The status of a node, frozen: read by the command line, the console and the API, changed by none of them."""

from __future__ import annotations

import msgspec

from meshnode.core.coordination.run import State
from meshnode.core.node.deployments import Deployment, Phase
from meshnode.core.node.mediator import Mediator
from meshnode.core.node.status import DeploymentStatus, NodeStatus, PeerStatus, StageStatus
from meshnode.core.planning.shortfall import MACHINES
from meshnode.identity.ids import NodeId, short
from meshnode.wire.demand import Demand
from meshnode.wire.messages import Claim, Progress


def status(mediator: Mediator, now: float, *, api_url: str, issuer: bool) -> NodeStatus:
    """Everything that `mediator` knows at `now`."""
    me = mediator.me
    return NodeStatus(
        node=mediator.node,
        name=me.name,
        mesh=mediator.authority.mesh,
        role=me.role,
        issuer=issuer,
        version=me.software,
        mesh_addresses=me.addresses,
        api_url=api_url,
        memory_usable=me.memory_usable,
        uptime_s=round(now - mediator.started_at, 3),
        peers=_peers(mediator, now),
        deployments=_all(mediator, now),
        warnings=_barred(mediator),
        draining=mediator.draining,
        counters={**mediator.counters, "refused_claims": mediator.ledger.refused},
    )


def _barred(mediator: Mediator) -> tuple[str, ...]:
    """Who lets this node in no more. Only their word: the lists that say so do not reach who is out."""
    links = [link for link in mediator.links.links.values() if link.barred]
    if not links:
        return ()
    told = "; ".join(sorted(f"{mediator.name_of(link.node)} says: {link.error}" for link in links))
    again = "To belong to it again: a new invite, and an empty data directory (--data PATH)"
    return (f"this node is out of the mesh, and dials nobody who says so ({told}). {again}",)


def _peers(mediator: Mediator, now: float) -> tuple[PeerStatus, ...]:
    nodes = sorted({*mediator.links.links, *mediator.roster.entries})
    return tuple(_peer(mediator, node, now) for node in nodes)


def _peer(mediator: Mediator, node: NodeId, now: float) -> PeerStatus:
    link, entry = mediator.links.links.get(node), mediator.roster.entries.get(node)
    body = entry.body if entry is not None else None
    if entry is not None and entry.left:
        state = "left"
    elif link is not None and link.barred:
        state = "barred"
    elif entry is not None and entry.dead:
        state = "dead"
    elif node in mediator.roster.conflicts:
        state = "conflict"
    elif mediator.membership.detector.suspected(node):
        state = "suspect"
    elif link is not None and link.up:
        state = "linked"
    elif entry is not None and entry.present and not (link is not None and link.wanted):
        state = "alive"
    else:
        state = "connecting" if body is None or link is None or link.failures == 0 else "lost"
    heard = max(link.heard_at if link else 0.0, entry.received_at if entry else 0.0)
    return PeerStatus(
        node=node,
        name=body.name if body is not None else short(node),
        state=state,
        addresses=body.addresses if body is not None else mediator.hints.get(node, ()),
        memory_usable=body.memory_usable if body is not None else 0,
        age_s=round(now - heard, 3) if heard else 0.0,
        rtt_ms=round(link.rtt_s * 1000, 3) if link is not None and link.rtt_s is not None else None,
        error="" if link is None or link.up else link.error,
        role=mediator.roster.authors[node].role if node in mediator.roster.authors else "",
        path="direct" if link is not None and link.up else "",
        serves=tuple(served.model for served in body.served) if body is not None else (),
        draining=body is not None and body.draining,
    )


def _own(mediator: Mediator) -> list[DeploymentStatus]:
    """Deployments that this node coordinates."""
    return [_deployment(mediator, deployment) for deployment in mediator.deployments.values()]


def _all(mediator: Mediator, now: float) -> tuple[DeploymentStatus, ...]:
    """What is served or on its way, then what is wanted beside that."""
    found = (*_own(mediator), *_granted(mediator, now), *_elsewhere(mediator))
    told = {each.deployment for each in found}
    return (*found, *(each for each in _wanted(mediator) if each.deployment not in told))


def _wanted(mediator: Mediator) -> list[DeploymentStatus]:
    """Demands of which nothing is loaded here: somebody prepares them, or nobody cares for them at the moment."""
    entries = mediator.roster.entries.items()
    found = []
    for demand in mediator.register.demands.wanted():
        key = demand.deployment
        holders = [node for node, entry in entries if key in entry.body.coordinates and mediator.reachable(node)]
        found.append(
            DeploymentStatus(
                deployment=key,
                model=demand.model,
                state="planning" if holders else "waiting",
                coordinator=min(holders, default=""),
                note="" if holders else _alone(mediator, demand),
            )
        )
    return found


def _alone(mediator: Mediator, demand: Demand) -> str:
    """What becomes of a demand that nobody cares for, and which machine to switch on if that is what it takes."""
    digest, entries = demand.manifest_digest, mediator.roster.entries
    has = {node for node, entry in entries.items() if digest in entry.body.cached}
    if digest in mediator.cached or any(mediator.reachable(node) for node in has):
        return "no machine that is here coordinates it yet: one that has some of it goes on"
    away = sorted(has) or [demand.author]
    names = [entries[node].body.name if node in entries else mediator.name_of(node) for node in away[:MACHINES]]
    return f"nothing of it is on the machines that are here: switch on {' or '.join(names)}"


def _deployment(mediator: Mediator, deployment: Deployment) -> DeploymentStatus:
    demand, run = deployment.demand, deployment.run
    if run is None:
        state = "planning" if deployment.phase is Phase.PLANNING else "waiting"
        return DeploymentStatus(
            deployment=demand.deployment,
            model=demand.model,
            state="failed" if deployment.failed else state,
            layers=len(deployment.footprint.layers),
            coordinator=mediator.node,
            note=deployment.note,
            failures=deployment.failures,
        )
    state = _SHOWN.get(run.state, run.state.value)
    return _of_claim(mediator, run.claim, state, run.stages, run.progress)


def _granted(mediator: Mediator, now: float) -> list[DeploymentStatus]:
    """Runs of other coordinators that use this node's memory."""
    found = []
    for run in mediator.ledger.held.values():
        coordinator = run.claim.coordinator
        if coordinator == mediator.node:
            continue
        shown = _of_claim(mediator, run.claim, "serving" if run.committed else "preparing", run.states, run.progress)
        if mediator.participant.lost(coordinator, now):
            note = f"{mediator.name_of(coordinator)}, which coordinates it, is gone: another machine goes on with it"
            shown = msgspec.structs.replace(shown, state="waiting", note=note)
        found.append(shown)
    return found


def _elsewhere(mediator: Mediator) -> list[DeploymentStatus]:
    """Models that others serve without this node's memory."""
    here = {run.claim.deployment for run in mediator.ledger.held.values()} | set(mediator.deployments)
    return [
        DeploymentStatus(
            deployment=served.deployment,
            model=served.model,
            state="serving",
            term=served.term,
            run=served.run,
            context=served.context,
            coordinator=node,
        )
        for node, entry in mediator.roster.entries.items()
        if mediator.reachable(node)
        for served in entry.body.served
        if served.deployment not in here
    ]


def _of_claim(
    mediator: Mediator, claim: Claim, state: str, states: dict[int, str], progress: dict[int, Progress]
) -> DeploymentStatus:
    phase, percent = ("", 0) if state == "serving" else _phase(claim, states, progress)
    leaving = sorted({mediator.name_of(stage.node) for stage in claim.stages if _draining(mediator, stage.node)})
    return DeploymentStatus(
        note=f"{', '.join(leaving)}: draining; the layers move as soon as others have room for them" if leaving else "",
        phase=phase,
        percent=percent,
        deployment=claim.deployment,
        model=claim.model,
        state=state,
        term=claim.fence.term,
        run=claim.fence.run,
        context=claim.options.context,
        lanes=claim.options.lanes,
        kv_type=claim.options.kv_type,
        layers=claim.layers,
        coordinator=claim.coordinator,
        stages=tuple(
            StageStatus(
                stage=stage.stage,
                node=stage.node,
                name=mediator.name_of(stage.node),
                first=stage.first,
                last=stage.last,
                state="serving" if state == "serving" else states.get(stage.stage, "claimed"),
                done=progress[stage.stage].done if stage.stage in progress else 0,
                total=progress[stage.stage].total if stage.stage in progress else 0,
                weight_bytes=stage.weight_bytes,
                kv_bytes=stage.kv_bytes,
            )
            for stage in claim.stages
        ),
    )


def _draining(mediator: Mediator, node: NodeId) -> bool:
    body = mediator.roster.body(node)
    return mediator.draining if node == mediator.node else body is not None and body.draining


def _phase(claim: Claim, states: dict[int, str], progress: dict[int, Progress]) -> tuple[str, int]:
    """What the stage that is least far does, and per cent of it over all stages, each as heavy as its weights."""
    at = {stage.stage: states.get(stage.stage, _PHASES[0]) for stage in claim.stages}
    phase = min(at.values(), key=lambda state: _PHASES.index(state) if state in _PHASES else len(_PHASES))
    done = 0
    for stage in claim.stages:
        part = progress.get(stage.stage)
        if at[stage.stage] != phase:
            done += stage.weight_bytes
        elif part is not None and part.phase == phase and part.total > 0:
            done += stage.weight_bytes * min(part.done, part.total) // part.total
    return phase, 100 * done // max(1, sum(stage.weight_bytes for stage in claim.stages))


_PHASES = ("claimed", "fetching", "fetched", "loading", "ready", "connected")
"""States of a stage on its way, in order."""

_SHOWN = {State.CLAIMING: "planning", State.FETCHING: "preparing", State.COMMITTING: "connecting"}
"""States of a run that people are told in other words."""
