"""What the log of a node in the foreground looks like: warnings and errors in one line each; everything with debug."""

from __future__ import annotations

import copy
import logging
import os
import traceback
from types import TracebackType

Caught = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class OneLine(logging.Formatter):
    """An exception is its name, its message and its place; the traceback is for MESHNODE_DEBUG=1."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, without what another formatter left on it."""
        own = copy.copy(record)
        own.exc_text = None
        return super().format(own)

    def formatException(self, ei: Caught) -> str:
        """The last line of a traceback, with where it happened."""
        _, error, trace = ei
        if error is None:
            return ""
        place = traceback.extract_tb(trace)[-1:]
        at = f" ({os.path.basename(place[0].filename)}:{place[0].lineno})" if place else ""
        return f"  {type(error).__name__}: {error}{at}"


def configure(handler: logging.Handler) -> None:
    """Send the log of this process to `handler`."""
    debug = bool(os.environ.get("MESHNODE_DEBUG"))
    handler.setFormatter(logging.Formatter() if debug else OneLine())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if debug else logging.WARNING)
