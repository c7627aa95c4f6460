"""The data directory on a real disk."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from meshnode.errors import ConfigError
from meshnode.io.disk.directory import DataDirectory

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_a_made_mesh_is_loaded_again(tmp_path: Path) -> None:
    directory = DataDirectory.open(tmp_path / "data")
    made = directory.make_mesh(NOW)
    directory.close()
    again = DataDirectory.open(tmp_path / "data")
    loaded = again.membership(NOW)
    assert loaded is not None
    assert loaded.credentials.node_id == made.credentials.node_id
    assert loaded.credentials.mesh_id == made.credentials.mesh_id
    assert loaded.issuer is not None
    again.close()


def test_a_second_node_in_one_directory_is_refused(tmp_path: Path) -> None:
    first = DataDirectory.open(tmp_path)
    with pytest.raises(ConfigError, match="another meshnode"):
        DataDirectory.open(tmp_path)
    first.close()
    DataDirectory.open(tmp_path).close()
