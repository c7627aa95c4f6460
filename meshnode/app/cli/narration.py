"""What changed between two snapshots of a node, as lines for a log: pure, so that tests read it like a transcript."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

from meshnode.app.cli.tables import SHORT_ID, progress_words, share, size
from meshnode.core.node.status import DeploymentStatus, NodeStatus, StageStatus

# A line per tenth: a log of an hour's fetch stays readable.
PROGRESS_STEPS = 10


class Narrator:
    """Tells a node's story to a log, and breaks a long silence before the model is served (R60). Times: seconds."""

    def __init__(self, patience_s: float, now: float) -> None:
        self._patience_s = patience_s
        self._silent_since = now
        self._told: NodeStatus | None = None

    def hear(self, status: NodeStatus, now: float) -> list[str]:
        """The lines to print after this snapshot, taken at `now`."""
        lines = list(changes(self._told, status))
        if self._told is None and status.issuer:
            # An invite is a secret, and what is printed here often ends in a log file: the command, not the line.
            lines.append("more machines: `meshnode invite` here, then the line that it prints there")
        waiting = [deployment for deployment in status.deployments if deployment.state != "serving"]
        if not lines and waiting and now - self._silent_since > self._patience_s:
            lines.append(f"no progress for {self._patience_s:.0f} s: {standing(True, status)}")
        if lines:
            self._silent_since = now
        self._told = status
        return lines


def changes(before: NodeStatus | None, now: NodeStatus) -> Iterator[str]:
    """Lines that tell how `now` differs from `before` (None: nothing was told yet)."""
    if before is None:
        yield f"node {now.name} ({now.node[:SHORT_ID]}) of mesh {now.mesh[:SHORT_ID]}, offers {size(now.memory_usable)}"
        yield f"members at {', '.join(now.mesh_addresses) or '-'}, endpoint {now.api_url}/v1"
    yield from _peer_changes(before, now)
    yield from _opening_changes(before, now)
    told = {*before.problems, *before.unhealthy} if before else set()
    for trouble in (*now.problems, *(f"alive but unhealthy: {reason}" for reason in now.unhealthy)):
        if trouble.removeprefix("alive but unhealthy: ") not in told:
            yield trouble
    old = {deployment.deployment: deployment for deployment in before.deployments} if before else {}
    for deployment in now.deployments:
        yield from _deployment_changes(old.get(deployment.deployment), deployment, now)


def _peer_changes(before: NodeStatus | None, now: NodeStatus) -> Iterator[str]:
    old = {peer.node: peer.state for peer in before.peers} if before else {}
    for peer in now.peers:
        if old.get(peer.node) != peer.state:
            why = f": {peer.error}" if peer.error and peer.state != "linked" else ""
            yield f"member {peer.name} ({peer.node[:SHORT_ID]}) {peer.state}{why}"


def _opening_changes(before: NodeStatus | None, now: NodeStatus) -> Iterator[str]:
    old = before.opening if before else {}
    for model, (done, total) in now.opening.items():
        if model not in old or _tenth(*old[model]) != _tenth(done, total):
            yield f"{model}: reading the file, {share(done, total)}"


def _deployment_changes(before: DeploymentStatus | None, now: DeploymentStatus, node: NodeStatus) -> Iterator[str]:
    if before is None or (before.state, before.note) != (now.state, now.note):
        # A shortfall has a line per node.
        yield f"{now.model}: {now.state}" + (f": {now.note}" if now.note else "").replace("\n", "\n    ")
    if now.stages and _layout(now) != _layout(before):
        yield f"{now.model}: context {now.context}, {now.lanes} lanes, KV {now.kv_type}, {len(now.stages)} stage(s)"
        for stage in now.stages:
            yield f"  stage {stage.stage} on {stage.name}: layers {stage.first}-{stage.last - 1}"
    old = {stage.stage: stage for stage in before.stages} if before and before.run == now.run else {}
    for stage in now.stages:
        yield from _stage_changes(old.get(stage.stage), stage)
    if now.state == "serving" and (before is None or before.state != "serving"):
        yield ready_line(node, now)


def _layout(deployment: DeploymentStatus | None) -> list[tuple[str, int, int]]:
    """Who holds what: a run that is built again in the same way is not told again."""
    return [(stage.node, stage.first, stage.last) for stage in deployment.stages] if deployment else []


def _stage_changes(before: StageStatus | None, now: StageStatus) -> Iterator[str]:
    if before is None or before.state != now.state or _tenth(before.done, before.total) != _tenth(now.done, now.total):
        yield f"  stage {now.stage} on {now.name}: {now.state} {progress_words(now)}".rstrip()


def _tenth(done: int, total: int) -> int:
    return PROGRESS_STEPS * done // total if total > 0 else 0


def ready_line(node: NodeStatus, deployment: DeploymentStatus) -> str:
    """What a person was waiting for."""
    return f"ready: {node.api_url}/v1 serves {deployment.model}"


def curl_line(api_url: str, model: str, question: str = "Hello", *, keyed: bool = False) -> str:
    """A command that asks the endpoint something, ready to paste; with `keyed` its key is a variable of the shell."""
    body = {"model": model, "messages": [{"role": "user", "content": question}]}
    quoted = shlex.quote(json.dumps(body))
    key = ' -H "Authorization: Bearer $API_KEY"' if keyed else ""
    return f"curl -s {api_url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {quoted}"


def standing(process_alive: bool, status: NodeStatus | None) -> str:
    """Why nothing is served yet, in one line: the process is dead, it loads (and how far), or it is unhealthy (R60)."""
    if not process_alive:
        return "the node's process has ended"
    if status is None:
        return "the node's process is alive, its endpoint does not answer"
    told = [f"{model}: alive and reading the file ({share(*part)})" for model, part in status.opening.items()]
    if not status.deployments and not told:
        return "the node is alive and has nothing to serve"
    for deployment in status.deployments:
        if deployment.state == "failed":
            told.append(f"{deployment.model}: alive but unhealthy: {deployment.note or 'the run failed'}")
            continue
        stages = [f"stage {stage.stage} {stage.state} {progress_words(stage)}".rstrip() for stage in deployment.stages]
        detail = "; ".join(filter(None, [deployment.note, *stages]))
        told.append(f"{deployment.model}: alive and {deployment.state}" + (f" ({detail})" if detail else ""))
    return "; ".join(told)
