"""What people see of the things that programs get with `--json`. Sizes are decimal: GB are 10^9 bytes everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

import msgspec
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from meshnode.app.admin import InviteListing, IssuerListing, PingAnswer
from meshnode.core.node.status import (
    DeploymentStatus,
    HeadLoad,
    NodeStatus,
    PeerStatus,
    StageLoad,
    StageStatus,
)

# Enough to tell nodes apart on a screen; nothing is ever compared by it.
SHORT_ID = 8


def size(count: int) -> str:
    """ "6.00 GB", "512 MB", "20 KB": three figures are what a person compares."""
    for unit, bytes_each in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= bytes_each:
            value = count / bytes_each
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{count} B"


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3.5 h", "2 d" """
    for unit, each, below in (("s", 1, 90), ("min", 60, 5400), ("h", 3600, 172800)):
        if abs(seconds) < below:
            return f"{seconds / each:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def plain_table(*columns: str, right: Iterable[str] = ()) -> Table:
    """A table without lines; the columns of `right` are numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        last = column == columns[-1]  # the only one that may be a whole sentence: it folds, the others stay readable
        table.add_column(column, justify="right" if column in right else "left", no_wrap=not last, overflow="fold")
    return table


def status_view(status: NodeStatus) -> RenderableType:
    """A node, its mesh, what it serves."""
    parts: list[RenderableType] = [_heading(status), *warnings_view(status), Text(), peers_table(status)]
    for deployment in status.deployments:
        parts += [Text(), deployment_view(deployment, status.loads)]
        if deployment.run in status.heads:
            parts.append(head_view(status.heads[deployment.run], deployment))
    parts += [Text(f"{model}: reading the file, {share(*part)}") for model, part in status.opening.items()]
    parts += [Text(f"alive but unhealthy: {reason}", style="red") for reason in status.unhealthy]
    parts += [Text(f"not loaded: {problem}", style="red") for problem in status.problems]
    if not status.deployments and not status.opening:
        parts += [Text(), Text("nothing is served: `meshnode serve MODEL.gguf` on any node of the mesh", style="dim")]
    return Group(*parts)


def _heading(status: NodeStatus) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_row("[bold]node[/]", f"{escape(status.name)} ({status.node[:SHORT_ID]}), {status.role}")
    grid.add_row("[bold]mesh[/]", f"{status.mesh[:SHORT_ID]}" + (", this node issues invites" if status.issuer else ""))
    grid.add_row("[bold]members at[/]", escape(", ".join(status.mesh_addresses) or "-"))
    grid.add_row("[bold]endpoint[/]", escape(f"{status.api_url}/v1"))
    grid.add_row("[bold]offers[/]", size(status.memory_usable))
    grid.add_row("[bold]up[/]", duration(status.uptime_s))
    return grid


def warnings_view(status: NodeStatus) -> list[RenderableType]:
    """What a person should see to; empty when there is nothing."""
    return [Text(f"! {warning}", style="yellow") for warning in status.warnings]


def peers_table(status: NodeStatus) -> RenderableType:
    """This node and every other member it knows."""
    table = plain_table("MEMBER", "ID", "STATE", "OFFERS", "RTT", "SEEN", "ADDRESS", right=("OFFERS", "RTT", "SEEN"))
    own = PeerStatus(status.node, status.name, "this node", status.mesh_addresses, status.memory_usable)
    own = msgspec.structs.replace(own, draining=status.draining)
    for peer in (own, *status.peers):
        table.add_row(
            escape(peer.name),
            peer.node[:SHORT_ID],
            _state(peer.state) + (", draining" if peer.draining else ""),
            size(peer.memory_usable) if peer.memory_usable else "-",
            f"{peer.rtt_ms:.1f} ms" if peer.rtt_ms is not None else "-",
            "-" if peer is own else duration(peer.age_s),
            escape(peer.error or ", ".join(peer.addresses[:2])),
        )
    return table


def members_table(status: NodeStatus) -> RenderableType:
    """Every other member, with the way to it and what it serves."""
    if not status.peers:
        return Text("no other member is known; `meshnode invite` lets one in", style="dim")
    columns = ("MEMBER", "ID", "ROLE", "STATE", "SEEN", "RTT", "PATH", "OFFERS", "SERVES")
    table = plain_table(*columns, right=("SEEN", "RTT", "OFFERS"))
    for peer in status.peers:
        # In one column, the last, which folds: a terminal of 80 columns has no room for more.
        serves = "" if peer.state in ("dead", "left") else ", ".join(peer.serves)
        words = [serves, "draining" if peer.draining else "", peer.error]
        table.add_row(
            escape(peer.name),
            peer.node[:SHORT_ID],
            escape(peer.role or "-"),
            _state(peer.state),
            duration(peer.age_s) if peer.age_s else "-",
            f"{peer.rtt_ms:.1f} ms" if peer.rtt_ms is not None else "-",
            peer.path or "-",
            size(peer.memory_usable) if peer.memory_usable else "-",
            escape("; ".join(filter(None, words)) or "-"),
        )
    return table


def ping_view(answer: PingAnswer) -> RenderableType:
    """A way between two members."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row("[bold]to[/]", f"{escape(answer.name)} ({answer.node[:SHORT_ID]})")
    grid.add_row("[bold]path[/]", escape(f"{answer.path}, {answer.address}"))
    spread = f"{min(answer.rtt_ms):.2f} to {max(answer.rtt_ms):.2f} ms"
    trips = f"median {answer.rtt_median_ms:.2f} ms of {len(answer.rtt_ms)} ({spread})"
    grid.add_row("[bold]round trips[/]", trips)
    rate = f"{size(answer.bytes_per_s)}/s from there, measured with {size(answer.transfer_bytes)}"
    grid.add_row("[bold]bandwidth[/]", rate)
    return grid


def head_view(head: HeadLoad, deployment: DeploymentStatus) -> RenderableType:
    """What a run of this node has to do."""
    paused = f", {head.paused} paused" if head.paused else ""
    lanes = f"{head.lanes_busy} of {deployment.lanes} lanes busy, {head.queued} queued{paused}"
    under_way = f"{head.in_flight} microbatches under way"
    if head.bubble is not None:
        under_way += f", stages idle {100 * head.bubble:.0f} % of busy time"
    cells = f"{head.cells_reserved} cells reserved, {head.cells_kept} kept from ended requests"
    asked = head.prompt_tokens + head.cached_tokens
    held = f"; {100 * head.cached_tokens / asked:.0f} % of prompts reused" if asked else ""
    return Text(f"{lanes}; {cells}\n{under_way}{held}", style="dim")


def deployment_view(deployment: DeploymentStatus, loads: Mapping[str, StageLoad]) -> RenderableType:
    """One model: who holds which layers, how far it is, and how busy those are that run here."""
    head = Text.assemble((deployment.model, "bold"), "  ", _state_text(deployment.state))
    if deployment.phase:
        head.append(f" ({deployment.phase}, {deployment.percent} %)")
    if deployment.context:
        known = f", {deployment.lanes} lanes, KV {deployment.kv_type}" if deployment.lanes else ""  # not told elsewhere
        head.append(f"  context {deployment.context}{known}", style="dim")
    parts: list[RenderableType] = [head]
    if deployment.stages:
        here = [loads.get(f"{deployment.run}/{stage.stage}") for stage in deployment.stages]
        busy_columns = ("BUSY", "ROWS") if any(here) else ()
        columns = ("STAGE", "MEMBER", "LAYERS", "WEIGHTS", "KV", *busy_columns, "STATE")
        table = plain_table(*columns, right=("STAGE", "WEIGHTS", "KV", *busy_columns))
        for stage, load in zip(deployment.stages, here, strict=True):
            table.add_row(
                str(stage.stage),
                escape(stage.name),
                f"{stage.first}-{stage.last - 1}",
                size(stage.weight_bytes),
                size(stage.kv_bytes),
                *(_load_words(load) if busy_columns else ()),
                Text.assemble(_state_text(stage.state), " ", progress_words(stage)),
            )
        parts.append(table)
    if deployment.note:
        parts.append(Text(deployment.note, style="yellow"))
    return Group(*parts)


def _load_words(load: StageLoad | None) -> tuple[str, str]:
    """How busy a stage is, and how large its microbatches are."""
    if load is None:
        return "-", "-"
    return f"{100 * load.busy:.0f} %", f"{load.rows_per_microbatch:g}" if load.rows_per_microbatch is not None else "-"


def progress_words(stage: StageStatus) -> str:
    """How far a stage is with fetching (bytes) or loading (parts per thousand); empty when there is nothing to tell."""
    if stage.state not in {"fetching", "loading"} or stage.total <= 0:
        return ""
    return share(stage.done, stage.total) if stage.state == "fetching" else percent(stage.done, stage.total)


def percent(done: int, total: int) -> str:
    """ "40 %", never above 100."""
    return f"{min(100, 100 * done // total) if total > 0 else 0} %"


def share(done: int, total: int) -> str:
    """ "40 % of 1.20 GB" """
    return f"{percent(done, total)} of {size(total)}"


_STYLES = {
    "linked": "green",
    "serving": "green",
    "ready": "green",
    "connected": "green",
    "open": "green",
    "active": "green",
    "this node": "cyan",
    "failed": "red",
    "lost": "red",
    "barred": "red",
    "locked": "red",
    "revoked": "red",
    "left": "dim",
    "used": "dim",
    "expired": "dim",
}


def _state_text(state: str) -> Text:
    return Text(state, style=_STYLES.get(state, "yellow"))


def _state(state: str) -> str:
    return f"[{_STYLES.get(state, 'yellow')}]{escape(state)}[/]"


def issuers_table(issuers: Iterable[IssuerListing], now: datetime) -> RenderableType:
    """Who may let others in, as far as the node that was asked knows."""
    table = plain_table("ISSUER", "NODE", "ID", "STATE", "CERTIFIED", "ENDS", right=("CERTIFIED",))
    for issuer in issuers:
        left = (issuer.expires_at.astimezone(UTC) - now).total_seconds() if issuer.expires_at is not None else None
        table.add_row(
            issuer.issuer[:SHORT_ID],
            escape(issuer.name or "-"),
            issuer.node[:SHORT_ID] or "-",
            _state(issuer.state),
            str(issuer.members),
            "-" if left is None else f"in {duration(left)}" if left > 0 else f"{duration(-left)} ago",
        )
    return table


def invites_table(invites: Iterable[InviteListing], now: datetime) -> RenderableType:
    """Invites and what became of them."""
    table = plain_table("INVITE", "ROLE", "STATE", "USED", "EXPIRES", right=("USED",))
    for invite in invites:
        left = (invite.expires_at.astimezone(UTC) - now).total_seconds()
        table.add_row(
            invite.id,
            invite.role,
            _state(invite.state),
            f"{invite.used}/{invite.uses}",
            f"in {duration(left)}" if left > 0 else f"{duration(-left)} ago",
        )
    return table
