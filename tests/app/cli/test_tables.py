"""What people see: everything that matters is in it, and nothing from a peer is taken for markup."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from rich.console import Console, RenderableType

from meshnode.app.admin import InviteListing
from meshnode.app.cli.tables import duration, invites_table, size, status_view
from meshnode.app.cli.view import picture
from meshnode.core.node.status import HeadLoad, StageLoad
from tests.app.cli.statuses import DEPLOYMENT, PEER, node


def drawn(view: RenderableType, width: int = 120) -> str:
    console = Console(width=width, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(view)
    return captured.get()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (20_000, "20.0 KB"),
        (512_000_000, "512 MB"),
        (6_000_000_000, "6.00 GB"),
        (10**13, "10.0 TB"),
    ],
)
def test_sizes_are_decimal_with_three_figures(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (720, "12 min"), (3 * 3600, "3 h"), (3 * 86400, "3 d")])
def test_durations_have_one_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_status_shows_members_stages_and_progress() -> None:
    lost = msgspec.structs.replace(PEER, name="cellar", state="lost", error="connection refused")
    text = drawn(status_view(node(DEPLOYMENT, peers=(PEER, lost))))
    for part in ("desk", "attic", "0.4 ms", "connection refused", "http://127.0.0.1:8421/v1", "6-11", "fetching 0 %"):
        assert part in text


def test_a_long_reason_folds_and_takes_no_room_from_names_ids_and_states() -> None:
    lost = msgspec.structs.replace(PEER, name="cellar", state="dead", error="cannot be reached: " + "no route, " * 12)
    text = drawn(status_view(node(peers=(PEER, lost))), 80)
    for part in ("attic", "cellar", PEER.node[:8], "linked", "dead", "no route"):
        assert part in text


def test_what_others_do_not_tell_of_a_run_is_not_shown_as_nothing() -> None:
    far = msgspec.structs.replace(DEPLOYMENT, lanes=0, kv_type="", stages=())
    assert "lanes" not in drawn(status_view(node(far)))


def test_an_empty_mesh_says_what_to_do_next() -> None:
    assert "meshnode serve" in drawn(status_view(node()))


def test_a_name_from_a_peer_is_never_markup() -> None:
    hostile = msgspec.structs.replace(PEER, name="[red]x[/nonsense]", error="[/]")
    assert "[red]x[/nonsense]" in drawn(status_view(node(peers=(hostile,))))


def test_invites_show_what_became_of_them() -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    listed = [
        InviteListing("i1", "member", "open", 2, 1, now + timedelta(hours=3)),
        InviteListing("i2", "client", "expired", 1, 0, now - timedelta(days=3)),
    ]
    text = drawn(invites_table(listed, now))
    assert "in 3 h" in text
    assert "3 d ago" in text
    assert "1/2" in text


def test_the_live_picture_has_a_bar_for_whatever_moves() -> None:
    reading = msgspec.structs.replace(node(DEPLOYMENT), opening={"big": (25, 100)})
    text = drawn(picture(reading))
    assert "tiny stage 1 fetching on attic" in text
    assert "big reading the file" in text
    assert "25 %" in text
    assert "━" not in drawn(picture(node()))


def test_a_status_shows_what_is_wrong_and_who_is_to_be_spared() -> None:
    loading = msgspec.structs.replace(DEPLOYMENT, phase="fetching", percent=40)
    spared = msgspec.structs.replace(PEER, draining=True)
    now = msgspec.structs.replace(
        node(loading, peers=(spared,)), unhealthy=("it is late",), problems=("big: no room on this disk",)
    )
    text = drawn(status_view(now))
    for words in (
        "(fetching, 40 %)",
        "linked, draining",
        "alive but unhealthy: it is late",
        "not loaded: big: no room",
    ):
        assert words in text


def test_a_status_shows_how_busy_a_run_and_its_stages_here_are() -> None:
    head = HeadLoad(2, 3, 1, 4, 2000, 512, 900, 300, 77, 0.25)
    serving = msgspec.structs.replace(DEPLOYMENT, run="beef", lanes=4)
    busy = msgspec.structs.replace(node(serving), heads={"beef": head}, loads={"beef/1": StageLoad(0.436, 1.5)})
    text = " ".join(drawn(status_view(busy)).split())
    for words in (
        "2 of 4 lanes busy, 3 queued, 1 paused; 2000 cells reserved, 512 kept from ended requests",
        "4 microbatches under way, stages idle 25 % of busy time; 25 % of prompts reused",
        "44 % 1.5",
    ):
        assert words in text
    assert "BUSY" not in drawn(status_view(node(DEPLOYMENT)))
