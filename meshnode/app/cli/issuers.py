"""Commands about issuers: add, list, revoke."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from meshnode.app.admin import IssuerListing, IssuerListings
from meshnode.app.cli.inquiries import control, write_json
from meshnode.app.cli.members import SHORTEST, confirmed, find
from meshnode.app.cli.tables import SHORT_ID, issuers_table
from meshnode.errors import ConfigError
from meshnode.identity.ids import is_id


def add(wanted: str, data: Path | None, as_json: bool) -> int:
    """Make a member an issuer."""
    with control(data) as node:
        peer = find(wanted, node.status())
        made = node.add_issuer(peer.node)
    if as_json:
        write_json(made)
        return 0
    until = f"{made.expires_at:%Y-%m-%d}" if made.expires_at is not None else "further notice"
    sys.stdout.write(
        f"{peer.name} ({peer.node[:SHORT_ID]}) is an issuer until {until}: `meshnode invite` works there\n"
    )
    return 0


def issuers(data: Path | None, as_json: bool) -> int:
    """List them."""
    with control(data) as node:
        listed = node.issuers()
    if as_json:
        write_json(listed)
    else:
        Console(highlight=False).print(issuers_table(listed.issuers, datetime.now(UTC)))
    return 0


def revoke(wanted: str, sure: bool, data: Path | None) -> int:
    """Bar one and everybody whom it let in, after a yes."""
    with control(data) as node:
        issuer = find_issuer(wanted, node.issuers())
        called = f"issuer {issuer.issuer[:SHORT_ID]}" + (f" on {issuer.name}" if issuer.name else "")
        if not sure and not confirmed(
            f"Revoke {called}? All that it let in ({issuer.members} known here) are out, its own node too."
        ):
            sys.stderr.write("nothing was changed\n")
            return 1
        node.revoke_issuer(issuer.issuer)
    sys.stdout.write(f"{called} is revoked\n")
    return 0


def find_issuer(wanted: str, listed: IssuerListings) -> IssuerListing:
    """The one issuer of this id, beginning of an id, or node. ConfigError for none and for several.

    A whole id that this node does not know counts too: the root may know better.
    """
    exact = [each for each in listed.issuers if wanted in {each.issuer, each.node, each.name} - {""}]
    low = wanted.lower()
    begins = [each for each in listed.issuers if len(low) >= SHORTEST and _begins(low, (each.issuer, each.node))]
    found = {each.issuer: each for each in exact or begins}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        ids = ", ".join(issuer[: 2 * SHORT_ID] for issuer in found)
        raise ConfigError(f"{wanted!r} is {len(found)} issuers: {ids}", "Name one by its own id.")
    if is_id(wanted):
        return IssuerListing(wanted)
    raise ConfigError(f"{wanted!r} is no issuer that this node knows", "`meshnode issuer list` shows them")


def _begins(text: str, ids: Sequence[str]) -> bool:
    return any(each.startswith(text) for each in ids)
