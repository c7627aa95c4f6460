"""`plan --what-if FILE`: machines that one does not have, as a TOML file.

author = "desk"            # who has the model file and the head; default: the first machine

[[machine]]
name = "desk"
memory = "12GB"            # what it offers
decode = "30GB"            # weights it reads per second while decoding; default: assumed
prefill = "300GB"          # the same, times rows, for a prompt
layer_us = 20              # per layer of a token, beside the weights
stage_us = 600             # per stage of a token
cores = 8

[[link]]
between = ["desk", "attic"]
rtt_ms = 0.4
mbit_s = 940
reachable = true
one_way = false            # true: only from the first to the second
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from meshnode.app.config import parse_size
from meshnode.core.planning import Inventory, NodeInventory
from meshnode.core.planning.inventory import LinkInventory
from meshnode.errors import ConfigError
from meshnode.identity.ids import NodeId

FILE_BYTES = 1_000_000
"""A thousand machines and their links take 100 KB."""

MACHINES = 1024
"""Four times the largest mesh that is simulated; a plan for more takes seconds."""

_HINT = "`meshnode plan --help` shows what the file may hold."


class Machine(msgspec.Struct, forbid_unknown_fields=True):
    """One `[[machine]]`."""

    name: str
    memory: str | int
    decode: str | int = 0
    prefill: str | int = 0
    layer_us: int = 0
    stage_us: int = 0
    cores: int = 0


class Way(msgspec.Struct, forbid_unknown_fields=True):
    """One `[[link]]`."""

    between: tuple[str, str]
    rtt_ms: float = 0.0
    mbit_s: float = 0.0
    reachable: bool = True
    one_way: bool = False


class WhatIf(msgspec.Struct, forbid_unknown_fields=True):
    """The whole file."""

    machine: list[Machine]
    link: list[Way] = []
    author: str = ""


def read_what_if(path: Path) -> tuple[Inventory, NodeId]:
    """The machines of the file, and who has the model. Errors: ConfigError that names the file and the place in it."""
    try:
        with path.expanduser().open("rb") as file:
            return inventory_of(_decoded(file.read(FILE_BYTES + 1)))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "Give the path of a TOML file.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {_place(str(error))}", _HINT) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", error.hint or _HINT) from None


def _decoded(text: bytes) -> WhatIf:
    if len(text) > FILE_BYTES:
        raise ConfigError(f"it is larger than {FILE_BYTES // 1000} KB")
    return msgspec.toml.decode(text, type=WhatIf)


def inventory_of(what_if: WhatIf) -> tuple[Inventory, NodeId]:
    """The planner's input, and the author. Errors: ConfigError."""
    names = [machine.name for machine in what_if.machine]
    if not 1 <= len(names) <= MACHINES:
        raise ConfigError(f"it lists {len(names)} machines, 1 to {MACHINES} are possible")
    for name in names:
        if not name or not name.isprintable() or names.count(name) > 1:
            raise ConfigError(f"{name!r} is no name for one machine alone")
    author = what_if.author or names[0]
    for name in (author, *(end for link in what_if.link for end in link.between)):
        if name not in names:
            raise ConfigError(f"no machine is called {name!r}", f"There are: {', '.join(names)}.")
    nodes = tuple(_machine(machine) for machine in what_if.machine)
    links = tuple(link for way in what_if.link for link in _links(way))
    return Inventory(nodes, links), NodeId(author)


def _machine(machine: Machine) -> NodeInventory:
    if min(machine.layer_us, machine.stage_us, machine.cores) < 0:
        raise ConfigError(f"{machine.name} has a number below zero")
    return NodeInventory(
        node=NodeId(machine.name),
        name=machine.name,
        usable_bytes=parse_size(machine.memory),
        cores=machine.cores,
        decode_bytes_per_s=parse_size(_speed(machine.decode)),
        prefill_bytes_per_s=parse_size(_speed(machine.prefill)),
        layer_us=machine.layer_us,
        stage_us=machine.stage_us,
    )


def _speed(text: str | int) -> str:
    """A size per second; people write the "/s" too."""
    return str(text).strip().removesuffix("/s")


def _links(way: Way) -> tuple[LinkInventory, ...]:
    rtt, speed = way.rtt_ms * 1000, way.mbit_s * 125_000
    one, other = way.between
    if one == other or not 0 <= rtt <= 10_000_000 or not 0 <= speed <= 1e14:
        raise ConfigError(f"the link between {one} and {other} is not possible", "Delays are 0 to 10000 ms.")

    def link(source: str, target: str) -> LinkInventory:
        return LinkInventory(NodeId(source), NodeId(target), int(rtt), int(speed), way.reachable)

    return (link(one, other),) if way.one_way else (link(one, other), link(other, one))


def _place(message: str) -> str:
    """A reader's words for msgspec's: "`$.machine[0].memory`" counts from nothing."""
    return re.sub(r"`\$\.?([^`]*)`", lambda found: f"`{found[1]}`" if found[1] else "the file", message)
