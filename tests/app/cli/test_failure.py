"""What a person reads when something does not work: one message, a next step, the right exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.app.cli.failure import CORRECTABLE, FAILED, INTERRUPTED, guarded, leaves, report
from meshnode.errors import ConfigError, InviteError, LinkLost, MeshError, StageLost


def _raise(error: BaseException) -> int:
    raise error


def test_a_users_error_has_its_hint_and_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: _raise(InviteError("the invite has expired", hint="ask for a new one"))) == CORRECTABLE
    printed = capsys.readouterr()
    assert printed.err == "meshnode: the invite has expired\n  ask for a new one\n"
    assert printed.out == ""


def test_circumstances_have_exit_code_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: _raise(StageLost("stage 1 ended"))) == FAILED
    assert capsys.readouterr().err == "meshnode: stage 1 ended\n"


def test_of_several_errors_the_one_that_a_person_can_correct_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    both = BaseExceptionGroup("two", [LinkLost("gone"), ExceptionGroup("inner", [ConfigError("wrong port")])])
    assert report(both) == CORRECTABLE
    assert capsys.readouterr().err == "meshnode: wrong port\n"


def test_the_systems_error_names_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: len(Path("/nonexistent/model.gguf").read_bytes())) == FAILED
    assert capsys.readouterr().err == "meshnode: /nonexistent/model.gguf: No such file or directory\n"


def test_ctrl_c_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: _raise(KeyboardInterrupt())) == INTERRUPTED
    assert guarded(lambda: _raise(BaseExceptionGroup("trio", [KeyboardInterrupt()]))) == INTERRUPTED
    assert capsys.readouterr().err == ""


def test_a_bug_says_that_it_is_one_and_how_to_see_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(ExceptionGroup("trio", [AssertionError("lanes do not add up"), LinkLost("gone")])) == FAILED
    told = capsys.readouterr().err
    assert "AssertionError: lanes do not add up" in told
    assert "MESHNODE_DEBUG=1" in told


def test_debug_shows_the_traceback_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHNODE_DEBUG", "1")
    with pytest.raises(MeshError):
        guarded(lambda: _raise(MeshError("seen whole")))


def test_errors_are_found_in_any_depth() -> None:
    inner = ConfigError("deep")
    assert next(leaves(ExceptionGroup("a", [ExceptionGroup("b", [inner]), OSError("x")]))) is inner
