"""`serve` and `join` as a person meets them: what is said, what is refused, and that leaving is clean."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from meshnode.app.admin import InviteIssued, InviteListings
from meshnode.core.node.status import NodeStatus
from meshnode.demo import MODEL
from meshnode.identity.invites import Invite, format_invite
from tests.app.cli.processes import Foreground, meshnode, node

pytestmark = [pytest.mark.e2e, pytest.mark.native]


def invite_for(address: str, life: timedelta) -> str:
    """A well-formed invite of a mesh that is not there."""
    expires = (datetime.now(UTC) + life).replace(microsecond=0)
    return format_invite(Invite(b"m" * 16, b"i" * 16, b"1" * 8, b"s" * 16, expires, (address,)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Foreground]]:
    """A node whose memory holds no model: it waits for members, and says how much is missing."""
    data = tmp_path_factory.mktemp("waiting")
    with node(data, "serve", str(MODEL), "--memory", "100MB", "--name", "desk") as running:
        running.until("waiting")
        yield data, running


def test_a_node_that_cannot_hold_its_model_says_by_how_much(waiting: tuple[Path, Foreground]) -> None:
    said = "\n".join(waiting[1].heard)
    assert "short by" in said
    assert "Traceback" not in said


def test_the_status_of_a_running_node_is_a_table_and_json(waiting: tuple[Path, Foreground]) -> None:
    told = meshnode("status", "--data", str(waiting[0]), "--json")
    assert told.returncode == 0
    status = msgspec.json.decode(told.stdout, type=NodeStatus)
    assert (status.name, status.deployments[0].state) == ("desk", "waiting")
    assert "desk" in meshnode("status", "--data", str(waiting[0])).stdout


def test_an_invite_is_made_listed_and_revoked_and_then_lets_nobody_in(
    waiting: tuple[Path, Foreground], tmp_path: Path
) -> None:
    data = str(waiting[0])
    made = msgspec.json.decode(meshnode("invite", "--data", data, "--json").stdout, type=InviteIssued)
    assert meshnode("invites", "revoke", made.id, "--data", data).returncode == 0
    listed = msgspec.json.decode(meshnode("invites", "list", "--data", data, "--json").stdout, type=InviteListings)
    assert [entry.state for entry in listed.invites if entry.id == made.id] == ["revoked"]
    refused = meshnode("join", made.invite, "--data", str(tmp_path), "--port", "0", "--api-port", "0")
    assert refused.returncode == 2
    assert "revoked" in refused.stderr


def test_a_second_node_in_one_data_directory_is_refused(waiting: tuple[Path, Foreground]) -> None:
    second = meshnode("serve", str(MODEL), "--data", str(waiting[0]), "--port", "0", "--api-port", "0")
    assert second.returncode == 2
    assert str(waiting[1].process.pid) in second.stderr


def test_a_taken_port_is_told_with_its_number(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = meshnode("serve", str(MODEL), "--data", str(tmp_path), "--port", "0", "--api-port", str(port))
    assert refused.returncode in {1, 2}
    assert str(port) in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("rubbish", 2, "invite"),
        (invite_for("127.0.0.1:1", timedelta(hours=-1)), 2, "expired"),
        (invite_for(f"127.0.0.1:{free_port()}", timedelta(hours=1)), 1, "127.0.0.1"),
    ],
    ids=["no invite at all", "expired", "nobody there"],
)
def test_a_join_that_cannot_be_leaves_no_membership(tmp_path: Path, line: str, code: int, words: str) -> None:
    refused = meshnode("join", line, "--data", str(tmp_path / "data"), "--port", "0", "--api-port", "0")
    assert refused.returncode == code, refused.stderr
    assert words in refused.stderr
    assert refused.stdout == ""
    again = meshnode("join", "--data", str(tmp_path / "data"), "--port", "0", "--api-port", "0")
    assert again.returncode == 2
    assert "meshnode invite" in again.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_node_serves_alone_and_leaves_within_five_seconds(tmp_path: Path, number: signal.Signals) -> None:
    with node(tmp_path, "serve", str(MODEL), "--memory", "2GB", "--context", "512") as running:
        running.until("ready: http://127.0.0.1:")
        running.process.send_signal(number)
        assert running.process.wait(5) == (130 if number == signal.SIGINT else 0)
    assert not (tmp_path / "node.json").exists()


def test_a_plan_is_made_without_a_node(tmp_path: Path) -> None:
    plan = ("plan", str(MODEL), "--data", str(tmp_path / "data"))
    planned = meshnode(*plan, "--memory", "160MB", "--memory", "1GB", "--json")
    assert planned.returncode == 0
    assert msgspec.json.decode(planned.stdout)["plan"]["model"]
    short = meshnode(*plan, "--memory", "100MB")
    assert short.returncode == 1
    assert "short by" in short.stderr
    assert not (tmp_path / "data").exists()
