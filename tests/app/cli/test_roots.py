"""The root key leaves a machine only encrypted, and is removed only when the copy is good."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from meshnode.app.cli.roots import decrypted
from meshnode.errors import ConfigError
from meshnode.identity.keys import private_key_of, spki_of
from meshnode.io.disk.directory import DataDirectory
from tests.app.cli.processes import meshnode

WORDS = "four words to keep"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    directory = DataDirectory.open(tmp_path / "data")
    directory.make_mesh(datetime.now(UTC))
    directory.close()
    return tmp_path / "data"


def export(data: Path, *more: str, said: str = f"{WORDS}\n{WORDS}\n") -> subprocess.CompletedProcess[str]:
    return meshnode("root", "export", str(data.parent / "root.pem"), "--data", str(data), *more, stdin=said)


def test_an_exported_key_is_the_key_and_private(data: Path) -> None:
    done = export(data)
    assert done.returncode == 0, done.stderr
    assert WORDS not in done.stdout + done.stderr
    written = data.parent / "root.pem"
    assert written.stat().st_mode & 0o777 == 0o600
    key = private_key_of((data / "root.key").read_bytes())
    copy = decrypted(written.read_bytes(), WORDS.encode())
    assert spki_of(copy.public_key()) == spki_of(key.public_key())
    with pytest.raises(ConfigError, match="another passphrase"):
        decrypted(written.read_bytes(), b"another passphrase")
    again = export(data)
    assert again.returncode == 2, "an older export is never replaced"
    assert "exists already" in again.stderr


def test_a_removed_key_is_gone_and_its_mesh_goes_on(data: Path) -> None:
    done = export(data, "--remove")
    assert done.returncode == 0, done.stderr
    assert not (data / "root.key").exists()
    directory = DataDirectory.open(data)
    held = directory.membership(datetime.now(UTC))
    directory.close()
    assert held is not None
    assert held.issuer is not None
    second = meshnode("root", "export", str(data.parent / "other.pem"), "--data", str(data))
    assert second.returncode == 2
    assert "holds no root key" in second.stderr


@pytest.mark.parametrize(("said", "why"), [(f"{WORDS}\n{WORDS}!\n", "differ"), ("short\nshort\n", "at least 12")])
def test_a_mistyped_or_short_passphrase_writes_and_removes_nothing(data: Path, said: str, why: str) -> None:
    refused = export(data, "--remove", said=said)
    assert refused.returncode == 2
    assert why in refused.stderr
    assert not (data.parent / "root.pem").exists()
    assert (data / "root.key").exists()
