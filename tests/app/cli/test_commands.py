"""Whole command lines, in this process: what they print and how they end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from meshnode import __version__
from meshnode.app.cli import main
from meshnode.app.cli.inquiries import parse_duration
from meshnode.errors import ConfigError


def ended(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    code = exit_.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MESHNODE_DATA", str(tmp_path / "data"))


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("version") == 0
    assert capsys.readouterr().out == f"meshnode {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("status",),
        ("status", "--json"),
        ("invite",),
        ("invite", "--expires", "soon"),
        ("invites",),
        ("invites", "list"),
        ("invites", "revoke", "i1"),
        ("serve",),
        ("serve", "no-such-model.gguf"),
        ("serve", __file__, "--memory", "lots"),
        ("serve", __file__, "--lanes", "0"),
        ("join", "--port", "8421"),
        ("join", "--api-host", "0.0.0.0"),
    ],
)
def test_what_cannot_be_done_is_one_message_with_exit_code_two(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert ended(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert 1 <= len(printed.err.splitlines()) <= 4
    assert not (tmp_path / "data").exists(), "nothing half-written"


@pytest.mark.parametrize("command", ["serve", "plan", "verify"])
@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(3), b"not a model " * 9], ids=["0", "4", "7", "108"])
def test_a_corrupt_model_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, content: bytes
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(content)
    assert ended(command, str(model)) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2, "what is wrong, and what to do"
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("24h", 86400), (" 7D ", 604800)])
def test_a_time_span_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "24", "h", "0h", "-1h", "1.5h", "24hours"])
def test_what_is_no_time_span_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_duration(text)


def test_the_version_answers_without_the_heavy_imports() -> None:
    """Start-up time as imports, which do not depend on the machine."""
    program = (
        "import sys; from meshnode.app.cli import main\ntry: main(['version'])\nexcept SystemExit: print(*sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    loaded = set(printed.split())
    assert loaded.isdisjoint({"numpy", "gguf", "llama_cpp", "trio", "cryptography", "httpx", "starlette"})
