"""Which issuer a person means, and what is shown of issuers and warnings."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from meshnode.app.admin import IssuerListing, IssuerListings
from meshnode.app.cli.issuers import find_issuer
from meshnode.app.cli.tables import issuers_table, status_view
from meshnode.errors import ConfigError
from tests.app.cli.statuses import node
from tests.app.cli.test_tables import drawn

NOW = datetime(2026, 5, 1, tzinfo=UTC)
ATTIC = IssuerListing("i" * 51 + "a", "b" * 51 + "a", "attic", NOW + timedelta(days=300), "active", 3)
CELLAR = IssuerListing("j" * 51 + "a", "c" * 51 + "a", "cellar", NOW - timedelta(days=3), "expired")
UNKNOWN = IssuerListing("k" * 51 + "a", members=1)
LISTED = IssuerListings((ATTIC, CELLAR, UNKNOWN))


@pytest.mark.parametrize("wanted", ["attic", ATTIC.issuer, ATTIC.node, "iiii", "BBBB"])
def test_an_issuer_is_found_by_its_node_or_its_own_id(wanted: str) -> None:
    assert find_issuer(wanted, LISTED) is ATTIC


def test_an_issuer_that_this_node_does_not_know_is_named_by_its_whole_id() -> None:
    stranger = "z" * 51 + "a"
    assert find_issuer(stranger, LISTED).issuer == stranger
    with pytest.raises(ConfigError, match="no issuer that this node knows"):
        find_issuer("", LISTED)


def test_two_issuers_on_nodes_of_one_name_are_told_apart_by_id() -> None:
    twin = msgspec.structs.replace(CELLAR, name="attic")
    with pytest.raises(ConfigError, match="2 issuers: iiiiiiii"):
        find_issuer("attic", IssuerListings((ATTIC, twin)))


def test_issuers_are_shown_with_what_is_known_of_them() -> None:
    text = drawn(issuers_table(LISTED.issuers, NOW))
    lines = [line.split() for line in text.splitlines()]
    assert ["iiiiiiii", "attic", "bbbbbbbb", "active", "3", "in", "300", "d"] in lines
    assert ["jjjjjjjj", "cellar", "cccccccc", "expired", "0", "3", "d", "ago"] in lines
    assert ["kkkkkkkk", "-", "-", "active", "1", "-"] in lines


def test_warnings_stand_above_the_members() -> None:
    text = drawn(status_view(msgspec.structs.replace(node(), warnings=("the root key lies here",))))
    assert text.index("! the root key lies here") < text.index("MEMBER")
