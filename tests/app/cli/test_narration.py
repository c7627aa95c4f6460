"""A node's start as its log tells it."""

from __future__ import annotations

import msgspec
import pytest

from meshnode.app.cli.narration import Narrator, changes, curl_line, standing
from tests.app.cli.statuses import DEPLOYMENT, PEER, node, with_stage

replace = msgspec.structs.replace


def test_the_first_lines_say_who_and_where() -> None:
    assert list(changes(None, node())) == [
        "node desk (aaaaaaaa) of mesh mmmmmmmm, offers 6.00 GB",
        "members at 192.0.2.1:8420, endpoint http://127.0.0.1:8421/v1",
    ]


def test_nothing_new_is_silent() -> None:
    status = node(DEPLOYMENT, peers=(PEER,))
    assert list(changes(status, replace(status, uptime_s=99.0))) == []


def test_a_member_is_told_when_its_state_changes() -> None:
    lost = replace(PEER, state="lost", error="connection refused")
    assert list(changes(node(), node(peers=(PEER,)))) == ["member attic (bbbbbbbb) linked"]
    assert list(changes(node(peers=(PEER,)), node(peers=(lost,)))) == [
        "member attic (bbbbbbbb) lost: connection refused"
    ]


def test_a_plan_is_told_once_and_then_progress_by_tenths() -> None:
    first = list(changes(node(), node(DEPLOYMENT)))
    assert first == [
        "tiny: preparing",
        "tiny: context 4096, 4 lanes, KV q8_0, 2 stage(s)",
        "  stage 0 on desk: layers 0-5",
        "  stage 1 on attic: layers 6-11",
        "  stage 0 on desk: ready",
        "  stage 1 on attic: fetching 0 % of 1.00 GB",
    ]
    little = with_stage(DEPLOYMENT, done=9 * 10**7)
    more = with_stage(DEPLOYMENT, done=15 * 10**7)
    assert list(changes(node(DEPLOYMENT), node(little))) == []
    assert list(changes(node(little), node(more))) == ["  stage 1 on attic: fetching 15 % of 1.00 GB"]
    loading = with_stage(DEPLOYMENT, state="loading", done=250, total=1000)
    assert list(changes(node(more), node(loading))) == ["  stage 1 on attic: loading 25 %"]


def test_reading_a_model_file_is_told_by_tenths() -> None:
    early, soon, later = (replace(node(), opening={"tiny": (done, 10**10)}) for done in (0, 10**8, 35 * 10**8))
    assert list(changes(node(), early)) == ["tiny: reading the file, 0 % of 10.0 GB"]
    assert list(changes(early, soon)) == []
    assert list(changes(soon, later)) == ["tiny: reading the file, 35 % of 10.0 GB"]
    assert standing(True, later) == "tiny: alive and reading the file (35 % of 10.0 GB)"


def test_serving_ends_with_the_line_a_person_waits_for() -> None:
    ready = replace(with_stage(DEPLOYMENT, state="connected"), state="serving")
    assert list(changes(node(DEPLOYMENT), node(ready)))[-1] == "ready: http://127.0.0.1:8421/v1 serves tiny"


def test_a_shortfall_is_told_when_its_reason_changes() -> None:
    waiting = replace(DEPLOYMENT, state="waiting", stages=(), note="short by 2 GB")
    enough = replace(waiting, note="short by 1 GB")
    assert list(changes(node(waiting), node(enough))) == ["tiny: waiting: short by 1 GB"]


def test_the_curl_line_is_one_json_request() -> None:
    line = curl_line("http://127.0.0.1:8421", "tiny", "What is a stage?")
    body = msgspec.json.decode(line.split(" -d '")[1].rstrip("'"))
    assert body == {"model": "tiny", "messages": [{"role": "user", "content": "What is a stage?"}]}
    assert "Bearer" not in line
    assert '-H "Authorization: Bearer $API_KEY"' in curl_line("http://127.0.0.1:8421", "tiny", keyed=True)


@pytest.mark.parametrize(
    ("alive", "status", "words"),
    [
        (False, None, "the node's process has ended"),
        (True, None, "the node's process is alive, its endpoint does not answer"),
        (True, node(), "the node is alive and has nothing to serve"),
        (True, node(DEPLOYMENT), "tiny: alive and preparing (stage 0 ready; stage 1 fetching 0 % of 1.00 GB)"),
        (
            True,
            node(replace(DEPLOYMENT, state="failed", note="stage 1 ended")),
            "tiny: alive but unhealthy: stage 1 ended",
        ),
    ],
)
def test_r60_dead_loading_and_unhealthy_are_told_apart(alive: bool, status: object, words: str) -> None:
    assert standing(alive, status) == words  # type: ignore[arg-type] # parametrized


def test_r60_a_long_silence_is_broken_once_in_a_while_until_the_model_is_served() -> None:
    narrator = Narrator(patience_s=60, now=0.0)
    loading = node(DEPLOYMENT)
    assert narrator.hear(loading, 1.0)
    assert narrator.hear(loading, 61.0) == []
    told = narrator.hear(loading, 62.0)
    assert told == ["no progress for 60 s: tiny: alive and preparing (stage 0 ready; stage 1 fetching 0 % of 1.00 GB)"]
    assert narrator.hear(loading, 121.0) == []
    serving = node(replace(DEPLOYMENT, state="serving"))
    assert narrator.hear(serving, 122.0)
    assert narrator.hear(serving, 1000.0) == []


def test_no_invite_is_written_to_a_log() -> None:
    lines = Narrator(60, 0.0).hear(node(), 0.0)
    assert "`meshnode invite`" in lines[-1]
    assert Narrator(60, 0.0).hear(replace(node(), issuer=False), 0.0) == lines[:-1]


def test_what_keeps_a_model_away_and_what_is_wrong_is_told_once() -> None:
    well = node()
    sick = msgspec.structs.replace(
        well, problems=("tiny: waits for a member called attic",), unhealthy=("it was late",)
    )
    assert list(changes(well, sick)) == ["tiny: waits for a member called attic", "alive but unhealthy: it was late"]
    assert list(changes(sick, sick)) == []
