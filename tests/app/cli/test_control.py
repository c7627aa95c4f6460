"""The command line against a node's admin routes, over real HTTP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from meshnode.app.admin import InviteRequest, RunningNode
from meshnode.app.cli.control import Control, running_node
from meshnode.errors import ConfigError, MeshError, Unavailable
from tests.app.cli.routes import ISSUED, TOKEN, serving
from tests.app.cli.statuses import NODE


@pytest.fixture
def url() -> Iterator[str]:
    with serving() as address:
        yield address


def describe(data: Path, node: RunningNode) -> None:
    (data / "node.json").write_bytes(msgspec.json.encode(node))
    (data / "api-token").write_text(TOKEN)


def test_the_node_of_a_data_directory_is_found_and_asked(tmp_path: Path, url: str) -> None:
    describe(tmp_path, RunningNode(pid=os.getpid(), mesh_port=1, api_port=int(url.rpartition(":")[2])))
    with Control.of(tmp_path) as control:
        assert control.status() == NODE
        assert control.invite(InviteRequest()) == ISSUED
        control.revoke_invite("i1")


def test_an_endpoint_that_is_not_on_loopback_is_asked_where_it_is(tmp_path: Path, url: str) -> None:
    describe(tmp_path, RunningNode(pid=os.getpid(), mesh_port=1, api_port=1, api_url=url))
    with Control.of(tmp_path) as control:
        assert control.status() == NODE


def test_no_node_or_a_killed_one_is_the_users_to_start(tmp_path: Path) -> None:
    assert running_node(tmp_path) is None
    with pytest.raises(ConfigError, match="no node is running"):
        Control.of(tmp_path)
    # Above any process id that Linux gives by default.
    describe(tmp_path, RunningNode(pid=2**22 + 1, mesh_port=1, api_port=1))
    with pytest.raises(ConfigError, match="the node here is dead") as refused:
        Control.of(tmp_path)
    assert "meshnode serve" in refused.value.hint


def test_a_damaged_node_file_counts_as_no_node(tmp_path: Path) -> None:
    (tmp_path / "node.json").write_text("{")
    assert running_node(tmp_path) is None


def test_a_refusal_keeps_the_nodes_words_and_hint(url: str) -> None:
    with Control(url, TOKEN) as control, pytest.raises(ConfigError, match="too many uses") as refused:
        control.invite(InviteRequest(uses=65))
    assert refused.value.hint == "at most 64"


def test_a_wrong_token_is_told(url: str) -> None:
    with Control(url, "other") as control, pytest.raises(ConfigError, match="wrong token"):
        control.status()


def test_an_answer_that_is_none_is_an_error_not_a_traceback(url: str) -> None:
    with Control(url, TOKEN) as control:
        with pytest.raises(MeshError, match="not understood"):
            control.invites()
        with pytest.raises(Unavailable, match="503"):
            control.shutdown()


def test_nobody_listening_is_unavailable() -> None:
    with Control("http://127.0.0.1:9", TOKEN) as control, pytest.raises(Unavailable, match="does not answer"):
        control.status()
