"""What a person can set on a node: one frozen tree, checked when it is made.

A value comes from the first of: command line flag, `MESHNODE_<NAME>` in the environment, `<data>/config.toml`, default.
All four use the same name (`--api-port`, `MESHNODE_API_PORT`, `api_port = 8421`, `Settings.api_port`).

Invariant: a `Settings` that exists is possible; whatever cannot work is a `ConfigError` before anything starts.
"""

from __future__ import annotations

import ipaddress
import platform
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

import platformdirs

from meshnode.app.api_keys import FAR_KEY_CHARACTERS, MAKE_ONE, parse_keys, parse_origins, read_keys
from meshnode.core.planning.footprint import KV_BLOCK_BYTES
from meshnode.errors import ConfigError
from meshnode.io.transport.addresses import split_address
from meshnode.wire.limits import ADDRESSES

MESH_PORT = 8420
API_PORT = 8421
# Every lane costs a KV reservation and a sampler on the last stage; beyond this no home machine gains throughput.
MAX_LANES = 64
# A stage needs 150 MB beside its slice (the planner's reserve), so less than this can never hold a layer; refuse
# here, where the person can see the typing error, and not in the planner.
MIN_MEMORY_BYTES = 8 * 2**20
# Far above any trained context of today (10M); keeps planner arithmetic and allocations sane.
MAX_CONTEXT_TOKENS = 16 * 2**20
# Fits in an announcement of 2 KB beside everything else, and in a table column.
MAX_NAME_CHARACTERS = 63

RPC_KEY = "rpc_servers"
"""What users of llama.cpp write; no setting of ours."""

_UNITS = {
    "": 1,
    "b": 1,
    **{prefix: 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}


def parse_size(text: str | int) -> int:
    """Bytes of "6GB" (decimal), "512MiB" (binary), "1.5g" or a plain number. ConfigError: anything else."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([a-zA-Z]{0,3})\s*", str(text))
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise ConfigError(f"{text!r} is not a size", hint="write for instance 6GB, 512MiB or 1.5GB")
    return int(float(found[1]) * unit)


def _whole(text: str | int) -> int:
    try:
        return int(str(text), 10)
    except ValueError:
        raise ConfigError(f"{text!r} is not a whole number") from None


def _flag(text: str | bool) -> bool:
    word = str(text).lower()
    if word not in {"true", "false", "1", "0", "yes", "no"}:
        raise ConfigError(f"{text!r} is neither true nor false")
    return word in {"true", "1", "yes"}


def _listed(value: str | list[Any]) -> tuple[str, ...]:
    """An empty list in any spelling ("", ",", blanks) is off (R99)."""
    parts = value.split(",") if isinstance(value, str) else [str(part) for part in value]
    return tuple(part.strip() for part in parts if part.strip())


def parse_cuts(text: str | list[int]) -> tuple[int, ...]:
    """Layer numbers of "4,9" or [4, 9], ascending; empty: none. Raises ConfigError."""
    parts = _listed(text if isinstance(text, str) else [str(part) for part in text])
    if not all(part.isdecimal() and len(part) < 6 for part in parts):
        raise ConfigError(f"{text!r} is not a list of layers", hint="write for instance --cuts 4,9")
    cuts = tuple(int(part) for part in parts)
    if 0 in cuts or list(cuts) != sorted(set(cuts)):
        raise ConfigError(f"{text!r} does not ascend from at least 1", hint="write for instance --cuts 4,9")
    return cuts


def _setting(default: Any, parse: Callable[[Any], Any], *, secret: bool = False) -> Any:
    return field(default=default, metadata={"parse": parse}, repr=not secret)


def host_name() -> str:
    """What people call this machine, as far as it can be shown to other members."""
    name = re.sub(r"[^\w.-]", "-", platform.node().split(".")[0])[:MAX_NAME_CHARACTERS]
    return name or "node"


def default_data() -> Path:
    """The platform's place for data of this user."""
    return Path(platformdirs.user_data_dir("meshnode", appauthor=False))


@dataclass(frozen=True)
class Settings:
    """One node's settings. Raises ConfigError when a value or a combination is impossible."""

    data: Path
    """Data directory: key, certificates, invites, fetched slices. One running node each."""
    name: str = _setting("", str)
    """Shown to other members; empty: the host's name."""
    listen: str = _setting("0.0.0.0", str)  # noqa: S104 - mutual TLS guards it, and a mesh on loopback joins nobody
    """Address of the mesh port. All interfaces: other machines must reach it, and nothing is said to whoever holds
    neither a certificate nor an invite. 127.0.0.1 keeps a mesh on this machine."""
    port: int = _setting(MESH_PORT, _whole)
    """TCP port for members and joiners; 0: any free one."""
    advertise: tuple[str, ...] = _setting((), _listed)
    """host:port that others should dial, where this machine's own addresses do not serve (port forwarding)."""
    wan: bool = _setting(False, _flag)
    """Leave the local network: dial public addresses and names of members, and announce this machine's own."""
    api_host: str = _setting("127.0.0.1", str)
    """Address of the OpenAI endpoint and console. Anything but loopback needs an API key, or `insecure`."""
    api_port: int = _setting(API_PORT, _whole)
    """TCP port of the endpoint; 0: any free one."""
    insecure: bool = _setting(False, _flag)
    """Serve the endpoint beyond loopback without a key: whoever reaches it may use it, and under any name."""
    api_key: tuple[str, ...] = _setting((), parse_keys, secret=True)
    """Keys of the model API, any of which a client must send; none: no key is asked for. Those of `api_key_file`
    join them."""
    api_key_file: str = _setting("", str)
    """A file with further keys, one a line: a key on a command line is seen by everybody on the machine."""
    requests_per_key: int = _setting(0, _whole)
    """Requests at the same time that one key may have; 0: as many as lanes and queue take."""
    cors_origins: tuple[str, ...] = _setting((), parse_origins)
    """Web pages, by origin, that may use the endpoint besides those of this machine; `*`: all, which needs a key."""
    mdns: bool = _setting(True, _flag)
    """Tell the local network that this node is here and find others (hints only), and admit by number."""
    memory: int = _setting(0, parse_size)
    """Bytes this node offers to the mesh; 0: what is free, less head-room."""
    context: int = _setting(0, _whole)
    """Cells of the KV cache in all, in tokens; 0: as many as fit, at most what the model was trained with."""
    lanes: int = _setting(4, _whole)
    """Sequences at the same time. 4: keeps up to 4 stages busy, and shares the context among few (R43)."""
    kv_type: str = _setting("", str)
    """Type of the KV cache (f32, f16, q8_0, q4_0); empty: q8_0 where the model allows it, else f16."""
    only: tuple[str, ...] = _setting((), _listed)
    """Members that may take layers of the served model, by name or id; empty: all."""
    exclude: tuple[str, ...] = _setting((), _listed)
    """Members that take none of its layers."""
    cuts: tuple[int, ...] = _setting((), parse_cuts)
    """Where to cut it, exactly: the first layer of every stage but the first; empty: where it is fastest."""
    threads: int = _setting(0, _whole)
    """Compute threads of a stage; 0: physical cores, divided among the stages of this node."""
    measure: bool = _setting(True, _flag)
    """Measure this machine's speed once and the ways to its peers, for the planner; without, it plans with defaults."""
    startup_timeout: int = _setting(600, _whole)
    """Seconds without any progress after which a pipeline that is being loaded is given up: a slow disk reads a slice
    for minutes, and every read part is progress."""
    start_wait_s: int = _setting(60, _whole)
    """How long to stay silent about a run that loads without progress before saying so (R60)."""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", host_name())
        for check in (_check_name, _check_ports, _check_hosts, _check_access, _check_serving):
            check(self)

    @property
    def api_is_local(self) -> bool:
        """Whether only programs of this machine reach the endpoint."""
        return ipaddress.ip_address(self.api_host).is_loopback

    @property
    def mdns_interfaces(self) -> tuple[str, ...]:
        """Addresses to speak mDNS on: where the mesh port listens; none: everywhere."""
        return () if ipaddress.ip_address(self.listen).is_unspecified else (self.listen,)

    @staticmethod
    def load(flags: Mapping[str, object], environment: Mapping[str, str]) -> Settings:
        """Settings from flags (None: not given), environment and `<data>/config.toml`. Raises ConfigError."""
        given = flags.get("data") or environment.get("MESHNODE_DATA") or default_data()
        data = Path(str(given)).expanduser().absolute()
        written = _read_file(data / "config.toml")
        _replaced(Path("MESHNODE_RPC_SERVERS"), environment.get("MESHNODE_RPC_SERVERS", ""))
        values: dict[str, Any] = {"data": data}
        for entry in _entries():
            values[entry.name] = _first(entry, flags, environment, written)
        if values["api_key_file"]:
            kept = read_keys(Path(values["api_key_file"]).expanduser())
            values["api_key"] = parse_keys((*values["api_key"], *kept))
        return Settings(**values)


def _entries() -> list[Field[Any]]:
    return [entry for entry in fields(Settings) if "parse" in entry.metadata]


def _first(
    entry: Field[Any], flags: Mapping[str, object], environment: Mapping[str, str], written: Mapping[str, object]
) -> Any:
    variable = f"MESHNODE_{entry.name.upper()}"
    places = (
        (f"--{entry.name.replace('_', '-')}", flags.get(entry.name)),
        (variable, environment.get(variable) or None),
        (f"config.toml: {entry.name}", written.get(entry.name)),
    )
    for place, value in places:
        if value is not None:
            try:
                return entry.metadata["parse"](value)
            except ConfigError as error:
                raise ConfigError(f"{place}: {error}", hint=error.hint) from None
    return entry.default


def _read_file(path: Path) -> Mapping[str, object]:
    """An absent file is an empty one. An unknown name is refused, else a typing error would be a silent default."""
    try:
        written = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="correct the file or remove it") from error
    written = {key: value for key, value in written.items() if key != RPC_KEY or not _replaced(path, value)}
    known = {entry.name for entry in _entries()}
    if unknown := sorted(set(written) - known):
        raise ConfigError(
            f"{path} sets {', '.join(unknown)}, which no setting is called", hint=f"known: {', '.join(sorted(known))}"
        )
    return written


def _replaced(place: Path, servers: object) -> bool:
    """Whether `rpc_servers` is off. llama.cpp's RPC servers are refused in one message that says what to do instead."""
    listed = _listed(servers) if isinstance(servers, str | list) else (str(servers),)
    if listed:
        raise ConfigError(
            f"{place}: {RPC_KEY} names llama.cpp RPC servers ({', '.join(listed)[:200]}), which anybody in the network"
            " could use; meshnode runs stages of its own there instead, over mutual TLS",
            hint=f"Take {RPC_KEY} out. Run `meshnode invite` here once a machine, and `meshnode join INVITE` on each of"
            " them in place of rpc-server.",
        )
    return True


def _check_name(settings: Settings) -> None:
    if len(settings.name) > MAX_NAME_CHARACTERS or not settings.name.isprintable():
        raise ConfigError(
            f"a node's name has at most {MAX_NAME_CHARACTERS} printable characters", hint="choose another --name"
        )


def _check_ports(settings: Settings) -> None:
    for flag, port in (("--port", settings.port), ("--api-port", settings.api_port)):
        if not 0 <= port < 2**16:
            raise ConfigError(f"{flag} {port} is not a TCP port", hint="0 to 65535; 0 takes any free one")
    if settings.port == settings.api_port != 0:
        raise ConfigError(
            f"--port and --api-port are both {settings.port}", hint="members and API clients need a port each"
        )


def _check_hosts(settings: Settings) -> None:
    for flag, host in (("--listen", settings.listen), ("--api-host", settings.api_host)):
        if not _is_address(host):
            raise ConfigError(
                f"{flag} {host!r} is not an IP address", hint="write for instance 127.0.0.1 or 192.168.1.20"
            )
    if len(settings.advertise) > ADDRESSES:
        # Peers refuse an announcement with more as impossible.
        raise ConfigError(
            f"--advertise has {len(settings.advertise)} addresses", hint=f"name the {ADDRESSES} that others reach best"
        )
    for place in settings.advertise:
        try:
            split_address(place)
        except ConfigError as error:
            raise ConfigError(f"--advertise: {error}", hint=error.hint) from None


def _check_access(settings: Settings) -> None:
    keys = settings.api_key
    if not settings.api_is_local and not settings.insecure:
        if not keys:
            raise ConfigError(
                f"--api-host {settings.api_host} would let everybody in the network use the endpoint, unencrypted",
                hint="keep it on 127.0.0.1 (every node of the mesh has its own endpoint), give it keys with"
                " --api-key-file, or add --insecure",
            )
        if min(map(len, keys)) < FAR_KEY_CHARACTERS:
            raise ConfigError(
                f"an API key of the endpoint on {settings.api_host} has fewer than {FAR_KEY_CHARACTERS} characters,"
                " and any machine that reaches it can try keys",
                hint=MAKE_ONE,
            )
    if "*" in settings.cors_origins and not keys:
        raise ConfigError(
            "--cors-origins * would let every web page that this machine visits use the endpoint",
            hint="name the pages, for instance https://chat.example, or give the endpoint keys with --api-key-file",
        )
    if not 0 <= settings.requests_per_key <= 4096:
        raise ConfigError(f"--requests-per-key {settings.requests_per_key} is not between 0 (no limit) and 4096")
    if settings.requests_per_key and not keys:
        raise ConfigError("--requests-per-key counts by key, and there is none", hint="add --api-key-file")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _check_serving(settings: Settings) -> None:
    if not 1 <= settings.lanes <= MAX_LANES:
        raise ConfigError(f"--lanes {settings.lanes} is not between 1 and {MAX_LANES}")
    if not 0 <= settings.context <= MAX_CONTEXT_TOKENS:
        raise ConfigError(f"--context {settings.context} is not between 0 (automatic) and {MAX_CONTEXT_TOKENS}")
    if settings.kv_type and settings.kv_type not in KV_BLOCK_BYTES:
        raise ConfigError(f"--kv-type {settings.kv_type!r} is unknown", hint=f"one of {', '.join(KV_BLOCK_BYTES)}")
    if 0 < settings.memory < MIN_MEMORY_BYTES or settings.memory < 0:
        raise ConfigError(f"--memory {settings.memory} bytes cannot hold a layer", hint="write for instance 6GB")
    if not 0 <= settings.threads <= 1024:
        raise ConfigError(f"--threads {settings.threads} is not between 0 (automatic) and 1024")
    if not 1 <= settings.startup_timeout <= 86400:
        raise ConfigError(f"--startup-timeout {settings.startup_timeout} is not between 1 and 86400 seconds")
    if not 1 <= settings.start_wait_s <= 86400:
        raise ConfigError(f"--start-wait-s {settings.start_wait_s} is not between 1 and 86400 seconds")
