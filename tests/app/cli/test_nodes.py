"""The command line with real nodes: what is told and made, and that leaving is clean (refusals: tests/e2e)."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from meshnode.app.admin import InviteIssued, InviteListings
from meshnode.app.cli.nodes import _node
from meshnode.app.config import Settings
from meshnode.app.intent import Resume
from meshnode.core.node.status import NodeStatus
from meshnode.demo import MODEL
from tests.app.cli.processes import Foreground, meshnode, node

pytestmark = [pytest.mark.e2e, pytest.mark.native]


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Foreground]]:
    """A node whose memory holds no model: it waits for members, and says how much is missing."""
    data = tmp_path_factory.mktemp("waiting")
    with node(data, "serve", str(MODEL), "--memory", "100MB", "--name", "desk") as running:
        assert "short by" in running.until("waiting")
        yield data, running


def test_what_a_node_imported_is_not_walked_by_collections_while_it_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    frozen: list[int] = []

    async def run_node(*_: object) -> None:
        frozen.append(gc.get_freeze_count() - len(gc.get_objects()))

    monkeypatch.setattr("meshnode.app.node.run_node", run_node)
    try:
        trio.run(_node, Resume(), Settings(tmp_path), trio.Event())
    finally:
        gc.unfreeze()
    assert frozen[0] > 0


def test_the_status_of_a_running_node_is_a_table_and_json(waiting: tuple[Path, Foreground]) -> None:
    told = meshnode("status", "--data", str(waiting[0]), "--json")
    assert told.returncode == 0
    status = msgspec.json.decode(told.stdout, type=NodeStatus)
    assert (status.name, status.deployments[0].state) == ("desk", "waiting")
    assert "desk" in meshnode("status", "--data", str(waiting[0])).stdout


def test_a_plan_asks_the_running_mesh(waiting: tuple[Path, Foreground]) -> None:
    short = meshnode("plan", str(MODEL), "--data", str(waiting[0]))
    assert short.returncode == 1
    assert "desk" in short.stderr


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
    piped = meshnode("join", "-", "--data", str(tmp_path), "--port", "0", "--api-port", "0", stdin=made.invite)
    assert piped.stderr == refused.stderr


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
