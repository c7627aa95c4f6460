"""`verify` and `bench` as commands: what is asked is checked, what is found is told."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from meshnode.app.cli import main
from meshnode.app.cli.measuring import parse_cuts
from meshnode.demo import MODEL
from meshnode.errors import ConfigError


def ended(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    code = exit_.value.code
    return code if isinstance(code, int) else 0


@pytest.mark.parametrize(("text", "cuts"), [(None, None), ("4", (4,)), (" 4, 9 ", (4, 9))])
def test_cuts_are_layers_in_order(text: str | None, cuts: tuple[int, ...] | None) -> None:
    assert parse_cuts(text) == cuts


@pytest.mark.parametrize("text", ["", "4,", "0,4", "9,4", "4,4", "four", "-1", "4.5", "123456"])
def test_what_is_no_list_of_cuts_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_cuts(text)


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
    assert ended("bench", "model", "--layers", "1", "--embd", "256", "--out", str(tmp_path / "none" / "x.gguf")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.gguf"]
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--stages", "0"), ("--threads", "0"), ("--rounds", "0"), ("--type", "no_such")])
def test_a_benchmark_that_cannot_be_is_refused(arguments: tuple[str, ...]) -> None:
    assert ended("bench", "split", "--layers", "1", "--embd", "256", *arguments) == 2
