"""Commands about models and machines of the node running here: load, unload, drain, cutover."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from meshnode.app.admin import Cutover, DrainRequest, LoadRequest
from meshnode.app.cli.inquiries import control, write_json
from meshnode.app.cli.members import find
from meshnode.app.cli.tables import SHORT_ID
from meshnode.errors import ConfigError


def load(request: LoadRequest, data: Path | None, as_json: bool) -> int:
    """Serve one more model."""
    with control(data) as node:
        answer = node.load(request)
    if as_json:
        write_json(answer)
    else:
        sys.stdout.write(f"{answer.model} is being loaded; `meshnode status --watch` shows how far it is\n")
    return 0


def unload(model: str, data: Path | None) -> int:
    """Serve it no more."""
    with control(data) as node:
        answer = node.unload(model)
    sys.stdout.write(
        f"{answer.model} is no longer served" + (f" ({answer.pipelines} pipelines)\n" if answer.pipelines > 1 else "\n")
    )
    return 0


def drain(wanted: str | None, undo: bool, data: Path | None) -> int:
    """Give a machine no more work; without a name this one."""
    with control(data) as node:
        status = node.status()
        if wanted is None or wanted in (status.name, status.node):
            member, name = status.node, status.name
        else:
            peer = find(wanted, status)
            member, name = peer.node, peer.name
        node.drain(DrainRequest(member, not undo))
    does = "takes work again" if undo else "takes no more work; what it holds moves to other machines that have room"
    sys.stdout.write(f"{name} ({member[:SHORT_ID]}) {does}\n")
    return 0


def cutover(model: str, dry_run: bool, data: Path | None, as_json: bool) -> int:
    """Show what a new plan would change."""
    if not dry_run:
        raise ConfigError(
            "a better plan is taken by itself when it gains 20 % for 30 s",
            "See what it would be with --dry-run; move work off a machine with `meshnode drain NODE`.",
        )
    with control(data) as node:
        answer = node.cutover(model)
    if as_json:
        write_json(answer)
        return 0
    console = Console(highlight=False, soft_wrap=True)
    for pipeline in answer.pipelines:
        for line in cutover_lines(pipeline):
            console.print(line, markup=False)
    if not answer.pipelines:
        console.print("this node was asked for no model")
    return 0


VERDICTS = {
    "keep": "stays as it is: the same plan would be made now",
    "stay": "stays as it is: the plan that would be made now gains less than 20 %",
    "replace": "would be replaced, if this holds for 30 s",
    "impossible": "could not be planned now",
    "none": "is not running; this plan would be tried",
}


def cutover_lines(pipeline: Cutover) -> list[str]:
    """One pipeline, for people."""
    lines = [f"{pipeline.model} ({pipeline.deployment[:SHORT_ID]}) {VERDICTS.get(pipeline.verdict, pipeline.verdict)}"]
    for what, plan in (("now", pipeline.present), ("new", pipeline.candidate)):
        if plan is None or (what == "new" and pipeline.verdict == "keep"):
            continue
        stages = ", ".join(f"{stage.name} {stage.first}-{stage.last - 1}" for stage in plan.stages)
        time = f", {plan.prediction.token_us / 1000:.1f} ms a token predicted" if plan.prediction is not None else ""
        lines.append(f"  {what}: {stages}{time}, context {plan.context}")
    if pipeline.shortfall is not None:
        lines.append(f"  {pipeline.shortfall.text()}")
    return lines
