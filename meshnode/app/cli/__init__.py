"""The command line. Each command imports what it needs when it runs, so that `meshnode version` answers at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command line and exit with its code."""
    # Interrupted while modules load, the process goes without a traceback: there is nothing yet that it would leave.
    interrupted = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from meshnode.app.cli.commands import application
    from meshnode.app.cli.failure import report

    signal.signal(signal.SIGINT, interrupted)

    if not os.environ.get("MESHNODE_DEBUG"):

        def told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            report(error)

        sys.excepthook = told
    application(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="meshnode")
    sys.exit(0)
