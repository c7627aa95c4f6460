"""A node's log: readable first, complete on demand."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from meshnode.app.cli.logs import configure

Handler = logging.StreamHandler[io.StringIO]


@pytest.fixture
def handler() -> Iterator[Handler]:
    root = logging.getLogger()
    before = root.level
    handler = logging.StreamHandler(io.StringIO())
    yield handler
    root.removeHandler(handler)
    root.setLevel(before)


def _add_up() -> None:
    raise AssertionError("lanes do not add up")


def _fail() -> None:
    try:
        _add_up()
    except AssertionError:
        logging.getLogger("meshnode.test").exception("the pipeline failed")


def test_an_internal_error_is_two_lines_with_its_place(handler: Handler) -> None:
    configure(handler)
    _fail()
    first, second = handler.stream.getvalue().splitlines()
    assert first == "the pipeline failed"
    assert second.startswith("  AssertionError: lanes do not add up (test_logs.py:")


def test_debug_writes_the_whole_traceback(handler: Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHNODE_DEBUG", "1")
    configure(handler)
    logging.getLogger("meshnode.test").debug("a detail")
    _fail()
    assert "a detail" in handler.stream.getvalue()
    assert "Traceback" in handler.stream.getvalue()


def test_details_are_silent_by_default(handler: Handler) -> None:
    configure(handler)
    logging.getLogger("meshnode.test").info("a detail")
    assert handler.stream.getvalue() == ""
