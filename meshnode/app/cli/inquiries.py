"""Commands that ask the node running here: invite, invites."""

from __future__ import annotations

import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console

from meshnode.app.admin import InviteRequest
from meshnode.app.cli.control import Control
from meshnode.app.cli.tables import duration, invites_table
from meshnode.app.config import Settings
from meshnode.errors import ConfigError

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> int:
    """Seconds of "30m", "24h", "7d" or "90s". Raises ConfigError."""
    found = re.fullmatch(r"(\d{1,6})([smhd])", text.strip().lower())
    if found is None or int(found[1]) == 0:
        raise ConfigError(f"{text!r} is not a time span", hint="write for instance 30m, 24h or 7d")
    return int(found[1]) * _SECONDS[found[2]]


def write_json(value: msgspec.Struct) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def control(data: Path | None) -> Control:
    """The running node of the data directory that flags, environment or platform name."""
    return Control.of(Settings.load({"data": data}, os.environ).data)


def invite(uses: int, expires: str, role: str, data: Path | None, as_json: bool) -> int:
    """Make an invite and print the line to paste."""
    request = InviteRequest(uses=uses, expires_s=parse_duration(expires), role=role)
    with control(data) as node:
        issued = node.invite(request)
    if as_json:
        write_json(issued)
        return 0
    # Only the command on stdout, so that it can be piped to another machine; the rest is for eyes.
    sys.stdout.write(f"meshnode join {issued.invite}\n")
    machines = "one machine" if uses == 1 else f"{uses} machines"
    sys.stderr.write(f"lets in {machines} as {role}, within {duration(request.expires_s)}; its id is {issued.id}\n")
    return 0


def invites(data: Path | None, as_json: bool) -> int:
    """List invites."""
    with control(data) as node:
        listed = node.invites()
    if as_json:
        write_json(listed)
    elif listed.invites:
        Console(highlight=False).print(invites_table(listed.invites, datetime.now(UTC)))
    else:
        sys.stdout.write("no invites; make one with `meshnode invite`\n")
    return 0


def revoke_invite(identity: str, data: Path | None) -> int:
    """Revoke one."""
    with control(data) as node:
        node.revoke_invite(identity)
    sys.stdout.write(f"{identity} is revoked\n")
    return 0
