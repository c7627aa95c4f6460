"""Who belongs to the mesh, and who does not any more: the commands, on real nodes. Each test has a mesh of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnode.demo import EXPECTED_ANSWER, QUESTION
from tests.e2e.conftest import MEMORY, three_nodes
from tests.e2e.nodes import RealMesh, RealNode, run_cli, until
from tests.e2e.test_answers import ask

pytestmark = pytest.mark.e2e


@pytest.fixture
def own_mesh(tmp_path: Path) -> Iterator[RealMesh]:
    made = three_nodes(tmp_path)
    yield made
    made.close()


def knows(node: RealNode, name: str) -> bool:
    return any(peer["name"] == name for peer in node.status()["peers"])


def test_a_revoked_node_is_out_everywhere_and_its_restart_is_refused_with_the_reason(own_mesh: RealMesh) -> None:
    founder, other, victim = own_mesh.nodes
    first = founder.serving()["run"]
    refused = run_cli("revoke", "three", "--yes", "--data", str(other.data))
    assert refused.returncode == 2
    assert "holds no issuer key" in refused.stderr
    unsure = run_cli("revoke", "three", "--data", str(founder.data))
    assert unsure.returncode == 1, "nobody said yes"
    assert knows(founder, "three")

    done = run_cli("revoke", "three", "--yes", "--data", str(founder.data))
    assert done.returncode == 0, done.stderr
    for node in (founder, other):
        until(f"{node.name} forgot it", lambda node=node: not knows(node, "three"))
    until("nobody links to it", lambda: victim.linked() == 0)
    until("its stages end", lambda: not victim.status()["stages"])
    until("the run through it ends", lambda: (founder.deployment() or {}).get("run") != first)
    until("it hears why", lambda: any("revoked" in peer["error"] for peer in victim.status()["peers"]))

    victim.stop()
    victim.start("join", *MEMORY)
    victim.await_running()
    until("it hears why again", lambda: any("revoked" in peer["error"] for peer in victim.status()["peers"]))
    until("the others tell that they refused it", lambda: "is refused: revoked from the mesh" in founder.words())
    until("nobody dials it", lambda: not knows(founder, "three"))
    for node in (founder, other):  # the lists are on disk
        node.stop()
    other.start("join", *MEMORY)
    other.await_running()
    until("a restarted node refuses it too", lambda: "is refused: revoked from the mesh" in other.words())


def certified(node: RealNode) -> dict[str, dict[str, object]]:
    """What `meshnode issuer list` shows, by the node that issues."""
    listed = json.loads(run_cli("issuer", "list", "--json", "--data", str(node.data)).stdout)["issuers"]
    return {each["name"]: each for each in listed}


def linked_to(node: RealNode, name: str) -> bool:
    return any(peer["name"] == name and peer["state"] == "linked" for peer in node.status()["peers"])


def join_through(issuer: RealNode, name: str, mesh: RealMesh) -> RealNode:
    node = RealNode(mesh.folder, name)
    mesh.nodes.append(node)
    node.start("join", issuer.invite())
    node.await_running()
    until(f"{issuer.name} knows {name}", lambda: linked_to(issuer, name))
    return node


def test_a_second_issuer_lets_in_without_the_first_until_the_root_revokes_it(tmp_path: Path) -> None:
    mesh = RealMesh(tmp_path)
    try:
        founder = mesh.found("one")
        founder_data = str(founder.data)
        second, other = join_through(founder, "two", mesh), join_through(founder, "three", mesh)
        assert any("only issuer" in warning for warning in founder.status()["warnings"])
        assert any("root key" in warning for warning in founder.status()["warnings"])
        refused = run_cli("issuer", "add", "three", "--data", str(second.data))
        assert (refused.returncode, "root key of this mesh is not on" in refused.stderr) == (2, True)
        refused = run_cli("invite", "--data", str(second.data))
        assert (refused.returncode, "holds no issuer key" in refused.stderr) == (2, True)

        made = run_cli("issuer", "add", "two", "--data", founder_data)
        assert made.returncode == 0, made.stderr
        assert certified(founder)["two"]["state"] == "active"
        assert not any("only issuer" in warning for warning in founder.status()["warnings"])
        assert "two" in run_cli("issuer", "list", "--data", str(second.data)).stdout
        founder.stop()
        joiner = join_through(second, "four", mesh)
        until("who was there before meets the new one", lambda: linked_to(other, "four"))

        founder.start("join")
        founder.await_running()
        until("the first meets it too", lambda: linked_to(founder, "four"))
        unsure = run_cli("issuer", "revoke", "two", "--data", founder_data)
        assert (unsure.returncode, "nothing was changed" in unsure.stderr) == (1, True)
        done = run_cli("issuer", "revoke", "two", "--yes", "--data", founder_data)
        assert done.returncode == 0, done.stderr
        for out in (second, joiner):
            until(f"{out.name} is out", lambda out=out: not knows(founder, out.name) and not knows(other, out.name))
            told = until(f"{out.name} hears why", lambda out=out: out.status()["warnings"])
            assert any("this node is out of the mesh" in warning for warning in told)
            until("in its log too", lambda out=out: "lets this node in no more: revoked from the mesh" in out.words())
            until(
                "with the reason",
                lambda out=out: any("the root of the mesh" in p["error"] for p in out.status()["peers"]),
            )
        until(
            "its log says it", lambda: "a connection of" in founder.words() and "revoked its issuer" in founder.words()
        )
        assert linked_to(founder, "three")
        assert certified(founder)["two"]["state"] == "revoked"
    finally:
        mesh.close()


def test_peers_and_ping_show_the_way_to_a_member(own_mesh: RealMesh) -> None:
    data = str(own_mesh.nodes[1].data)
    listed = json.loads(run_cli("peers", "--json", "--data", data).stdout)["peers"]
    founder = next(peer for peer in listed if peer["name"] == "one")
    assert (founder["state"], founder["path"], founder["role"]) == ("linked", "direct", "member")
    assert founder["serves"] == [own_mesh.nodes[0].serving()["model"]]
    table = run_cli("peers", "--data", data).stdout
    assert re.search(r"one .*linked .*direct", table)
    answer = json.loads(run_cli("ping", founder["node"][:10], "--json", "--data", data).stdout)
    assert answer["name"] == "one"
    assert answer["address"] in founder["addresses"]
    assert answer["rtt_median_ms"] > 0
    assert answer["transfer_bytes"] > 0
    assert "bandwidth" in run_cli("ping", "one", "--data", data).stdout
    assert run_cli("ping", "nobody", "--data", data).returncode == 2


def test_a_client_asks_and_is_never_given_work(own_mesh: RealMesh) -> None:
    founder = own_mesh.nodes[0]
    client = RealNode(own_mesh.folder, "client")
    own_mesh.nodes.append(client)
    client.start("join", founder.invite(role="client"))
    client.await_running()
    until("the client sees the model", client.ready)
    assert client.status()["role"] == "client"
    assert ask(client.client(), QUESTION) == EXPECTED_ANSWER
    seen = next(peer for peer in founder.status()["peers"] if peer["name"] == "client")
    assert seen["role"] == "client"
    assert all(stage["name"] != "client" for stage in founder.serving()["stages"])
    assert run_cli("ping", "one", "--data", str(client.data)).returncode == 2
