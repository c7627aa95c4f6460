"""What a person gets wrong: one clear message, what to do next, the right exit code, nothing half-written."""

from __future__ import annotations

import concurrent.futures
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from meshnode.demo import MODEL
from tests.e2e.nodes import RealMesh, RealNode, run_cli, until

pytestmark = pytest.mark.e2e

PORTS = ("--listen", "127.0.0.1", "--port", "0", "--api-port", "0")


@pytest.fixture(scope="module")
def founder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealNode]:
    """One node that admits others; too little memory to load anything."""
    mesh = RealMesh(tmp_path_factory.mktemp("founder"))
    yield mesh.found("founder", "--memory", "100MB")
    mesh.close()


def refused(*arguments: str, code: int, says: str) -> None:
    """The command ends with `code` and one message without a traceback."""
    done = run_cli(*arguments)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "empty"), (b"hello", "GGUF"), (MODEL.read_bytes()[:300_000], "cut short")],
)
def test_a_corrupt_model_is_refused_before_a_mesh_is_made(tmp_path: Path, content: bytes, says: str) -> None:
    model, data = tmp_path / "model.gguf", tmp_path / "data"
    model.write_bytes(content)
    refused("serve", str(model), "--data", str(data), *PORTS, code=2, says=says)
    assert not data.exists()


def test_an_architecture_that_llama_cpp_does_not_know_is_named_before_a_mesh_is_made(tmp_path: Path) -> None:
    model, data = tmp_path / "new.gguf", tmp_path / "data"
    writer = GGUFWriter(model, "foobar")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_context_length(64)
    writer.add_head_count(1)
    for name in ("token_embd.weight", "output.weight", "blk.0.attn_q.weight"):
        writer.add_tensor(name, np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused("serve", str(model), "--data", str(data), *PORTS, code=2, says="unknown model architecture: 'foobar'")
    assert not data.exists()


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    refused("serve", str(tmp_path / "none.gguf"), "--data", str(tmp_path / "data"), *PORTS, code=2, says="none.gguf")


def test_options_that_no_mesh_could_serve_are_refused_before_a_mesh_is_made(tmp_path: Path) -> None:
    data = tmp_path / "data"
    refused("serve", str(MODEL), "--context", "100000", "--data", str(data), *PORTS, code=2, says="2048")
    assert not data.exists()


def test_joining_without_a_membership_or_an_invite_says_how_to_get_one(tmp_path: Path) -> None:
    refused("join", "--data", str(tmp_path / "data"), *PORTS, code=2, says="meshnode invite")


def test_an_invite_that_is_none_or_damaged_is_refused(tmp_path: Path, founder: RealNode) -> None:
    data = ("--data", str(tmp_path / "data"), *PORTS)
    refused("join", "hello", *data, code=2, says="not an invite")
    invite = founder.invite()
    refused("join", invite[:-3], *data, code=2, says="invite")
    assert not (tmp_path / "data" / "mesh.pem").exists()


def test_an_expired_and_a_revoked_invite_are_refused(tmp_path: Path, founder: RealNode) -> None:
    short = founder.invite(expires_s=1)
    until("it has expired", lambda: any(i["state"] == "expired" for i in founder.api("GET", "/api/invites")["invites"]))
    refused("join", short, "--data", str(tmp_path / "a"), *PORTS, code=2, says="expired")
    made = founder.api("POST", "/api/invites", {})
    assert run_cli("invites", "revoke", made["id"], "--data", str(founder.data)).returncode == 0
    refused("join", made["invite"], "--data", str(tmp_path / "b"), *PORTS, code=2, says="revoked")
    assert not (tmp_path / "b" / "mesh.pem").exists()


def test_of_two_machines_that_race_for_one_invite_one_becomes_a_member(tmp_path: Path, founder: RealNode) -> None:
    invite = founder.invite()
    racers = [RealNode(tmp_path, "left"), RealNode(tmp_path, "right")]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda node: node.start("join", invite, "--memory", "100MB"), racers))

    def settled() -> bool:
        return all((node.data / "node.json").exists() or node.process.poll() is not None for node in racers)

    until("both are through", settled)
    members = [node for node in racers if (node.data / "mesh.pem").exists()]
    assert len(members) == 1
    loser = next(node for node in racers if node not in members)
    assert loser.process.wait(60) == 2
    assert "already used" in loser.words()
    members[0].stop(signal.SIGKILL)


def test_an_issuer_that_is_away_is_named_by_its_address(tmp_path: Path) -> None:
    mesh = RealMesh(tmp_path)
    node = mesh.found("gone", "--memory", "100MB")
    invite = node.invite()
    node.stop()
    refused("join", invite, "--data", str(tmp_path / "data"), *PORTS, code=1, says="cannot be reached")
    mesh.close()


def test_a_member_does_not_join_another_mesh_with_the_same_data(tmp_path: Path, founder: RealNode) -> None:
    mesh = RealMesh(tmp_path)
    other = mesh.found("other", "--memory", "100MB")
    other.stop()
    refused("join", founder.invite(), "--data", str(other.data), *PORTS, code=2, says="--data")
    mesh.close()


def test_a_second_node_in_one_data_directory_is_refused(founder: RealNode) -> None:
    refused("serve", str(MODEL), "--data", str(founder.data), *PORTS, code=2, says=str(founder.process.pid))


def test_a_taken_port_is_named(tmp_path: Path, founder: RealNode) -> None:
    port = str(founder.running["api_port"])
    flags = ("--data", str(tmp_path / "data"), "--listen", "127.0.0.1", "--port", "0", "--api-port", port)
    refused("serve", str(MODEL), *flags, code=2, says=port)


def test_too_little_memory_says_how_much_is_short_and_waits(founder: RealNode) -> None:
    found = until("it was planned", lambda: (d := founder.deployment()) and d["state"] == "waiting" and d["note"] and d)
    assert "short by" in found["note"]
    plan = run_cli("plan", str(MODEL), "--memory", "100MB")
    assert plan.returncode == 1
    assert "short by" in plan.stdout + plan.stderr


def test_commands_that_need_a_node_say_how_to_start_one(tmp_path: Path) -> None:
    for command in ("status", "invite", "invites"):
        refused(command, "--data", str(tmp_path / "none"), code=2, says="meshnode serve")
