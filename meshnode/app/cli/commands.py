"""Every command and its options. The bodies only translate: options in, exit code out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meshnode.app.cli.benches import bench_group
from meshnode.app.cli.failure import guarded
from meshnode.app.cli.registering import Json, command

application = typer.Typer(
    name="meshnode",
    help="One private LLM endpoint from a handful of ordinary machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


invites_group = typer.Typer(help="List invites, or revoke one.", invoke_without_command=True, rich_markup_mode=None)
application.add_typer(invites_group, name="invites")
application.add_typer(bench_group, name="bench")
issuer_group = typer.Typer(help="Who may let others in.", no_args_is_help=True, rich_markup_mode=None)
application.add_typer(issuer_group, name="issuer")
root_group = typer.Typer(help="The key that made the mesh.", no_args_is_help=True, rich_markup_mode=None)
application.add_typer(root_group, name="root")

Data = Annotated[Path | None, typer.Option(help="Data directory; one per node. Default: the platform's place.")]
Watch = Annotated[bool, typer.Option("--watch", help="Go on until Ctrl-C; with --json a line a change.")]
Peer = Annotated[str, typer.Argument(help="Its name, the beginning of its id, or the whole id.", metavar="PEER")]
Model = Annotated[Path, typer.Argument(help="A GGUF file (of several: the first).", metavar="MODEL")]
Memory = Annotated[str | None, typer.Option(help="What this node offers, e.g. 6GB. Default: what is free, less 15 %.")]
Name = Annotated[str | None, typer.Option(help="What other members call this node. Default: the host's name.")]
Listen = Annotated[str | None, typer.Option(help="Address of the mesh port. Default: all interfaces (mutual TLS).")]
Port = Annotated[int | None, typer.Option(help="Mesh port, for members. Default: 8420; 0: any free one.")]
Advertise = Annotated[str | None, typer.Option(help="host:port that others dial, behind port forwarding.")]
ApiPort = Annotated[int | None, typer.Option(help="Port of the OpenAI endpoint. Default: 8421; 0: any free one.")]
ApiHost = Annotated[str | None, typer.Option(help="Address of the endpoint. Default: 127.0.0.1.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow an endpoint beyond loopback without a key.")]
ApiKey = Annotated[
    list[str] | None, typer.Option(help="A key that clients must send; repeatable. Others see it in ps.")
]
ApiKeyFile = Annotated[Path | None, typer.Option(help="A file with such keys, one a line.")]
PerKey = Annotated[int | None, typer.Option("--requests-per-key", help="Requests at once of one key. Default: all.")]
CorsOrigins = Annotated[str | None, typer.Option(help="Web pages that may ask, e.g. https://chat.example; commas.")]
NoMdns = Annotated[bool, typer.Option("--no-mdns", help="Say and hear nothing by mDNS; admit by invite only.")]
NoMeasure = Annotated[bool, typer.Option("--no-measure", help="Plan with usual speeds instead of measuring them.")]
Wan = Annotated[bool, typer.Option("--wan", help="Leave the local network: dial public addresses and host names.")]
Threads = Annotated[int | None, typer.Option(help="Compute threads of a stage. Default: physical cores.")]
Context = Annotated[int | None, typer.Option(help="Tokens of KV cache in all. Default: as many as fit.")]
Lanes = Annotated[int | None, typer.Option(help="Requests at the same time. Default: 4.")]
KvType = Annotated[str | None, typer.Option(help="KV cache: f32, f16, q8_0 or q4_0. Default: q8_0 where possible.")]
Only = Annotated[list[str] | None, typer.Option(help="Only this member may take layers (name or id); repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="This member takes no layers; repeatable.")]
Cuts = Annotated[str | None, typer.Option(help="Where to cut, exactly: e.g. 4,9. Default: where it is fastest.")]
StartupTimeout = Annotated[int | None, typer.Option(help="Seconds without progress that end a load. Default: 600.")]


@command(application)
def serve(
    model: Model,
    context: Context = None,
    lanes: Lanes = None,
    kv_type: KvType = None,
    only: Only = None,
    exclude: Exclude = None,
    cuts: Cuts = None,
    startup_timeout: StartupTimeout = None,
    memory: Memory = None,
    name: Name = None,
    listen: Listen = None,
    port: Port = None,
    advertise: Advertise = None,
    api_host: ApiHost = None,
    api_port: ApiPort = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    requests_per_key: PerKey = None,
    cors_origins: CorsOrigins = None,
    insecure: Insecure = False,
    no_mdns: NoMdns = False,
    wan: Wan = False,
    threads: Threads = None,
    no_measure: NoMeasure = False,
    data: Data = None,
) -> int:
    """Serve MODEL: alone if it fits, otherwise with whoever joins. The first start makes the mesh."""
    from meshnode.app.cli.nodes import serve as run

    return run(
        model,
        {
            "context": context,
            "lanes": lanes,
            "kv_type": kv_type,
            "only": only or None,
            "exclude": exclude or None,
            "cuts": cuts,
            "startup_timeout": startup_timeout,
            "memory": memory,
            "name": name,
            "listen": listen,
            "port": port,
            "advertise": advertise,
            "api_host": api_host,
            "api_port": api_port,
            "api_key": api_key or None,
            "api_key_file": api_key_file,
            "requests_per_key": requests_per_key,
            "cors_origins": cors_origins,
            "insecure": insecure or None,
            "mdns": False if no_mdns else None,
            "wan": wan or None,
            "threads": threads,
            "measure": False if no_measure else None,
            "data": data,
        },
    )


@command(application)
def join(
    invite: Annotated[
        str | None, typer.Argument(help="The line of `meshnode invite`, or - for stdin; only the first time.")
    ] = None,
    memory: Memory = None,
    name: Name = None,
    listen: Listen = None,
    port: Port = None,
    advertise: Advertise = None,
    api_host: ApiHost = None,
    api_port: ApiPort = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    requests_per_key: PerKey = None,
    cors_origins: CorsOrigins = None,
    insecure: Insecure = False,
    no_mdns: NoMdns = False,
    wan: Wan = False,
    threads: Threads = None,
    no_measure: NoMeasure = False,
    data: Data = None,
) -> int:
    """Lend this machine to a mesh and use its endpoint here. Without INVITE: go on, or look around this network."""
    from meshnode.app.cli.nodes import join as run

    return run(
        invite,
        {
            "memory": memory,
            "name": name,
            "listen": listen,
            "port": port,
            "advertise": advertise,
            "api_host": api_host,
            "api_port": api_port,
            "api_key": api_key or None,
            "api_key_file": api_key_file,
            "requests_per_key": requests_per_key,
            "cors_origins": cors_origins,
            "insecure": insecure or None,
            "mdns": False if no_mdns else None,
            "wan": wan or None,
            "threads": threads,
            "measure": False if no_measure else None,
            "data": data,
        },
    )


@command(application)
def invite(
    uses: Annotated[int, typer.Option(help="How many machines it lets in.")] = 1,
    expires: Annotated[str, typer.Option(help="How long it works: 30m, 24h, 7d.")] = "24h",
    role: Annotated[str, typer.Option(help="member (lends itself) or client (only asks).")] = "member",
    data: Data = None,
    json: Json = False,
) -> int:
    """Print one line that lets another machine join the mesh of the node running here."""
    from meshnode.app.cli.inquiries import invite as run

    return run(uses, expires, role, data, json)


@command(application)
def pending(data: Data = None, json: Json = False) -> int:
    """Show the machine that asks to join without an invite, and the number to compare."""
    from meshnode.app.cli.comparing import pending as run

    return run(data, json)


@command(application)
def approve(code: Annotated[list[str], typer.Argument(metavar="CODE")], data: Data = None) -> int:
    """Let in the machine that shows the number CODE."""
    from meshnode.app.cli.comparing import approve as run

    return run("".join(code), data)


@invites_group.callback()
def invites(context: typer.Context, data: Data = None, json: Json = False) -> None:
    """List the invites of the node running here, or revoke one."""
    if context.invoked_subcommand is None:
        raise typer.Exit(guarded(lambda: list_invites(data, json)))


@command(invites_group, "list")
def list_invites(data: Data = None, json: Json = False) -> int:
    """List the invites of the node running here and what became of them."""
    from meshnode.app.cli.inquiries import invites as run

    return run(data, json)


@command(invites_group, "revoke")
def revoke_invite(identity: Annotated[str, typer.Argument(metavar="ID")], data: Data = None) -> int:
    """Make an invite worthless. Who has joined already stays."""
    from meshnode.app.cli.inquiries import revoke_invite as run

    return run(identity, data)


@command(application)
def status(data: Data = None, json: Json = False, watch: Watch = False) -> int:
    """Show the node running here, its members and what they serve."""
    from meshnode.app.cli.members import status as run

    return run(data, json, watch)


@command(application)
def peers(data: Data = None, json: Json = False, watch: Watch = False) -> int:
    """List the other members: state, last word, round trip, path, memory, what they serve."""
    from meshnode.app.cli.members import peers as run

    return run(data, json, watch)


@command(application)
def ping(peer: Peer, data: Data = None, json: Json = False) -> int:
    """Measure the way from the node running here to PEER: round trips, bandwidth, path."""
    from meshnode.app.cli.members import ping as run

    return run(peer, data, json)


@command(application)
def revoke(
    peer: Peer,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    data: Data = None,
) -> int:
    """Bar PEER from the mesh for good; only where this node holds an issuer key."""
    from meshnode.app.cli.members import revoke as run

    return run(peer, yes, data)


@command(issuer_group, "add")
def add_issuer(peer: Peer, data: Data = None, json: Json = False) -> int:
    """Let PEER invite, approve, renew and revoke too, for a year; only where the root key lies."""
    from meshnode.app.cli.issuers import add as run

    return run(peer, data, json)


@command(issuer_group, "list")
def list_issuers(data: Data = None, json: Json = False) -> int:
    """List the issuers that the node running here knows of."""
    from meshnode.app.cli.issuers import issuers as run

    return run(data, json)


@command(issuer_group, "revoke")
def revoke_issuer(
    issuer: Annotated[str, typer.Argument(help="Its node's name, or its own id.", metavar="ISSUER")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    data: Data = None,
) -> int:
    """Bar ISSUER and everybody whom it let in; only where the root key lies."""
    from meshnode.app.cli.issuers import revoke as run

    return run(issuer, yes, data)


@command(application)
def load(
    model: Model,
    context: Context = None,
    lanes: Lanes = None,
    kv_type: KvType = None,
    only: Only = None,
    exclude: Exclude = None,
    cuts: Cuts = None,
    replicas: Annotated[int, typer.Option(min=1, help="Pipelines of it, on machines of their own each.")] = 1,
    data: Data = None,
    json: Json = False,
) -> int:
    """Serve MODEL too, on the node running here and with its mesh. The file lies on this machine."""
    from meshnode.app.admin import LoadRequest
    from meshnode.app.cli.serving import load as run
    from meshnode.app.config import parse_cuts

    request = LoadRequest(
        str(model.expanduser().absolute()),
        context=context or 0,
        lanes=lanes or 0,
        kv_type=kv_type or "",
        only=tuple(only or ()),
        exclude=tuple(exclude or ()),
        cuts=parse_cuts(cuts or ""),
        replicas=replicas,
    )
    return run(request, data, json)


@command(application)
def unload(name: Annotated[str, typer.Argument(help="As `meshnode status` shows it.")], data: Data = None) -> int:
    """Serve a model no more; answers under way end."""
    from meshnode.app.cli.serving import unload as run

    return run(name, data)


@command(application)
def drain(
    node: Annotated[str | None, typer.Argument(help="Name or id of a member. Default: this node.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Let it take work again.")] = False,
    data: Data = None,
) -> int:
    """Give a machine no more work and move what it has to others, before it is switched off."""
    from meshnode.app.cli.serving import drain as run

    return run(node, undo, data)


@command(application)
def cutover(
    model: Annotated[
        str, typer.Argument(help="As `meshnode status` shows it. Default: every model of this node.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show it.")] = False,
    data: Data = None,
    json: Json = False,
) -> int:
    """Compare the pipelines that run with those that would be planned now."""
    from meshnode.app.cli.serving import cutover as run

    return run(model, dry_run, data, json)


@command(application)
def plan(
    model: Model,
    memory: Annotated[
        list[str] | None,
        typer.Option(help="Plan for imagined machines instead, one --memory each: --memory 8GB --memory 4GB."),
    ] = None,
    what_if: Annotated[
        Path | None,
        typer.Option(help="Plan for the machines of this TOML file: [[machine]] name, memory, decode; [[link]] ..."),
    ] = None,
    context: Context = None,
    lanes: Lanes = None,
    kv_type: KvType = None,
    only: Only = None,
    exclude: Exclude = None,
    cuts: Cuts = None,
    replicas: Annotated[int, typer.Option(min=1, help="Pipelines of this model, on machines of their own.")] = 1,
    data: Data = None,
    json: Json = False,
) -> int:
    """Show who would run which layers of MODEL, how fast, and when not to split; or what is missing. Starts nothing."""
    from meshnode.app.cli.planning import Imagined
    from meshnode.app.cli.planning import plan as run

    flags = {
        "context": context,
        "lanes": lanes,
        "kv_type": kv_type,
        "only": only or None,
        "exclude": exclude or None,
        "cuts": cuts,
        "data": data,
    }
    return run(model, Imagined(memory or (), what_if), flags, json, replicas)


@command(application)
def verify(
    model: Model,
    stages: Annotated[int, typer.Option(min=2, help="How many slices.")] = 2,
    cuts: Annotated[str | None, typer.Option(help="Where to cut instead, e.g. 4,9.")] = None,
    json: Json = False,
) -> int:
    """Run MODEL whole and in slices, here, and compare what comes out, bit for bit. Exit code 1 when it differs."""
    from meshnode.app.cli.measuring import verify as run

    return run(model, stages, cuts, json)


@command(root_group, "export")
def root_export(
    file: Annotated[Path, typer.Argument(help="Where to write it; keep it off this machine.", metavar="FILE")],
    remove: Annotated[bool, typer.Option("--remove", help="Delete it here once the file is good.")] = False,
    data: Data = None,
) -> int:
    """Write the mesh's root key to FILE, encrypted with a passphrase that is asked twice."""
    from meshnode.app.cli.roots import export as run

    return run(file, remove, data)


@command(application)
def demo(
    leave: Annotated[
        bool, typer.Option("--exit", help="End after the answer; exit code 0 only if it is right.")
    ] = False,
) -> int:
    """Three nodes on this machine, the embedded model split over them, one question."""
    from meshnode.app.demo import run_demo

    return run_demo(stay=not leave)


@command(application)
def version() -> int:
    """Print the version."""
    from meshnode import __version__

    typer.echo(f"meshnode {__version__}")
    return 0
