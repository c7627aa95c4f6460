"""`verify` and `bench` as commands: what is asked is checked, what is found is told."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from meshnode.app.cli import main
from meshnode.demo import MODEL


def ended(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    code = exit_.value.code
    return code if isinstance(code, int) else 0


@pytest.mark.native
def test_verify_tells_that_the_embedded_model_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("verify", str(MODEL), "--stages", "2", "--json") == 0
    told = msgspec.json.decode(capsys.readouterr().out)
    assert (told["verdict"], told["exact"], told["tokens_equal"]) == ("exact", True, True)
    assert ended("verify", str(MODEL), "--cuts", "3,7") == 0
    assert "exact" in capsys.readouterr().out


def test_cuts_outside_the_model_are_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("verify", str(MODEL), "--cuts", "99") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_benchmark_model_is_written_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    assert ended("bench", "model", "--layers", "1", "--embd", "256", "--out", str(good)) == 0
    assert good.read_bytes().startswith(b"GGUF")
    assert ended("bench", "model", "--layers", "1", "--embd", "256", "--type", "no_such", "--out", str(bad)) == 2
    assert ended("bench", "model", "--layers", "1", "--embd", "256", "--out", str(tmp_path / "none" / "x.gguf")) == 2
    assert ended("bench", "model", "--layers", "1", "--embd", "256", "--out", str(tmp_path)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.gguf"]
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--stages", "0"), ("--threads", "0"), ("--rounds", "0"), ("--type", "no_such")])
def test_a_benchmark_that_cannot_be_is_refused(arguments: tuple[str, ...]) -> None:
    assert ended("bench", "split", "--layers", "1", "--embd", "256", *arguments) == 2
