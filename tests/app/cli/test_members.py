"""Which member a person means, and what --watch takes for a change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from meshnode.app.admin import PingAnswer, RunningNode
from meshnode.app.cli.members import find, steady
from meshnode.app.cli.tables import members_table, ping_view
from meshnode.errors import ConfigError
from tests.app.cli.routes import TOKEN, serving
from tests.app.cli.statuses import PEER, node
from tests.app.cli.test_tables import drawn

OTHER = msgspec.structs.replace(PEER, node="bbbb" + "c" * 48, name="cellar")
STRANGER = "e" * 51 + "a"


@pytest.mark.parametrize("wanted", ["attic", "b" * 52, "bbbbb", "BBBBB"])
def test_a_member_is_found_by_name_by_id_and_by_the_beginning_of_its_id(wanted: str) -> None:
    assert find(wanted, node(peers=(PEER, OTHER))) is PEER


def test_what_fits_several_members_is_refused_with_all_of_them() -> None:
    with pytest.raises(ConfigError, match="2 members") as refused:
        find("bbbb", node(peers=(PEER, OTHER)))
    assert "bbbbbbbb" in str(refused.value)
    assert "bbbbcccc" in str(refused.value)


def test_two_members_of_one_name_are_told_apart_by_id_only() -> None:
    twin = msgspec.structs.replace(OTHER, name="attic")
    with pytest.raises(ConfigError, match="2 members"):
        find("attic", node(peers=(PEER, twin)))
    assert find("bbbbc", node(peers=(PEER, twin))) is twin


def test_a_name_that_begins_like_another_members_id_is_ambiguous() -> None:
    named = msgspec.structs.replace(OTHER, name="bbbbb")
    with pytest.raises(ConfigError, match="2 members"):
        find("bbbbb", node(peers=(PEER, named)))


@pytest.mark.parametrize("wanted", ["", "bbb", "nobody", STRANGER])
def test_nobody_is_found_by_too_little_or_by_what_is_unknown(wanted: str) -> None:
    with pytest.raises(ConfigError, match="no other member"):
        find(wanted, node(peers=(PEER,)))


def test_only_a_whole_id_may_name_a_stranger() -> None:
    assert find(STRANGER, node(peers=(PEER,)), strangers=True).node == STRANGER
    with pytest.raises(ConfigError):
        find(STRANGER[:10], node(peers=(PEER,)), strangers=True)


def test_ages_and_round_trips_are_no_change_but_states_are() -> None:
    before = node(peers=(PEER,))
    older = msgspec.structs.replace(PEER, age_s=3.0, rtt_ms=9.0)
    later = msgspec.structs.replace(node(peers=(older,)), uptime_s=99.0, counters={"dialed": 3})
    assert steady(before) == steady(later)
    lost = msgspec.structs.replace(PEER, state="lost")
    assert steady(before) != steady(node(peers=(lost,)))


def test_members_are_shown_with_the_way_to_them_and_never_as_markup() -> None:
    peer = msgspec.structs.replace(PEER, role="member", path="direct", serves=("tiny", "[b]x[/z]"), memory_usable=10**9)
    text = drawn(members_table(node(peers=(peer,))))
    for part in ("attic", "member", "linked", "0.4 ms", "direct", "1.00 GB", "tiny, [b]x[/z]"):
        assert part in text
    assert "meshnode invite" in drawn(members_table(node()))


def test_a_dead_member_serves_nothing() -> None:
    peer = msgspec.structs.replace(PEER, state="dead", serves=("tiny",), error="it cannot be reached")
    text = drawn(members_table(node(peers=(peer,))))
    assert "tiny" not in text
    assert "it cannot be reached" in text


def test_a_terminal_of_80_columns_shows_a_draining_member_whole() -> None:
    peer = msgspec.structs.replace(
        PEER, role="member", path="direct", serves=("tiny",), memory_usable=10**9, draining=True, age_s=2.0
    )
    head, line, *_ = drawn(members_table(node(peers=(peer,))), width=80).splitlines()
    assert " ".join(head.split()) == "MEMBER ID ROLE STATE SEEN RTT PATH OFFERS SERVES"
    assert " ".join(line.split()) == "attic bbbbbbbb member linked 2 s 0.4 ms direct 1.00 GB tiny; draining"


def test_a_ping_shows_median_spread_rate_and_path() -> None:
    answer = PingAnswer("b" * 52, "attic", "direct", "192.0.2.2:8420", (0.5, 1.0, 7.0), 1.0, 32_000_000, 110_000_000)
    text = drawn(ping_view(answer))
    for part in ("attic", "direct, 192.0.2.2:8420", "median 1.00 ms of 3 (0.50 to 7.00 ms)", "110 MB/s"):
        assert part in text


def test_watching_as_json_writes_a_line_for_the_first_look(tmp_path: Path) -> None:
    with serving() as url:
        running = RunningNode(pid=os.getpid(), mesh_port=1, api_port=1, api_url=url)
        (tmp_path / "node.json").write_bytes(msgspec.json.encode(running))
        (tmp_path / "api-token").write_text(TOKEN)
        command = [sys.executable, "-m", "meshnode.app.cli", "status", "--watch", "--json", "--data", str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            assert json.loads(watching.stdout.readline())["name"] == "desk"
            watching.kill()
