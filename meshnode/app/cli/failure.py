"""How the command line says that something did not work: one message, what to do next, an exit code, no traceback.

Exit codes: 2 the person can correct it (ConfigError, usage), 1 circumstances or a bug, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator

from meshnode.errors import ConfigError, MeshError

CORRECTABLE = 2
FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def guarded(command: Callable[[], int]) -> int:
    """Run a command to its exit code; every failure becomes a message on stderr."""
    if os.environ.get("MESHNODE_DEBUG"):
        return command()
    try:
        return command()
    except BrokenPipeError:
        # `meshnode status | head`: the reader has what it wants. Python must not flush into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (KeyboardInterrupt, MeshError, OSError, BaseExceptionGroup) as error:
        return report(error)


def report(error: BaseException) -> int:
    """Say what went wrong; returns the exit code. Whatever is not ours to explain raises on."""
    causes = list(leaves(error))
    if all(isinstance(cause, KeyboardInterrupt) for cause in causes):
        return INTERRUPTED
    told = [cause for cause in causes if isinstance(cause, MeshError | OSError)]
    if len(told) < len([cause for cause in causes if not isinstance(cause, KeyboardInterrupt)]):
        # A bug: say so in one line, and where to find more, but keep the terminal readable.
        worst = next(cause for cause in causes if cause not in told)
        place = traceback.extract_tb(worst.__traceback__)[-1:]
        at = f" ({os.path.basename(place[0].filename)}:{place[0].lineno})" if place else ""
        return _say(
            f"internal error: {type(worst).__name__}: {worst}{at}",
            "this is a bug of meshnode; MESHNODE_DEBUG=1 shows the traceback",
            FAILED,
        )
    first = next((cause for cause in told if isinstance(cause, ConfigError)), told[0])
    if isinstance(first, ConfigError):
        return _say(str(first), first.hint, CORRECTABLE)
    if isinstance(first, OSError):
        return _say(_operating_system(first), "", FAILED)
    return _say(str(first), getattr(first, "hint", ""), FAILED)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors inside nested groups, in order."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def _operating_system(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def _say(message: str, hint: str, code: int) -> int:
    sys.stderr.write(f"meshnode: {message}\n")
    if hint:
        sys.stderr.write(f"  {hint}\n")
    return code
