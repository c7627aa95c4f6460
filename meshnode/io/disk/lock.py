"""One node per data directory, and no stage left of its former life: locks that the system releases when the processes
that hold them end, however they end."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meshnode.errors import ConfigError

_LOCKED_BYTE = 1 << 30
"""Windows forbids reading locked bytes: lock one far behind the process id."""


class DirectoryLock:
    """Held from construction until `release`."""

    def __init__(self, path: Path) -> None:
        """Take the lock in the file `path`; `ConfigError` naming the holder's process id when it is taken."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if not _try_lock(self._file):
            holder = os.read(self._file, 32).decode("ascii", errors="replace").strip()
            os.close(self._file)
            raise ConfigError(
                f"another meshnode (process {holder or 'unknown'}) uses {path.parent}",
                "Stop it, or give this one a directory of its own: --data PATH.",
            )
        os.ftruncate(self._file, 0)
        os.write(self._file, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Let the next one in; the file stays, so that nobody locks a deleted one."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


@contextmanager
def share(path: Path) -> Iterator[int]:
    """A descriptor with a share of the lock in `path`. A child that inherits it holds the share until it ends: from its
    very first moment, and without doing anything for it. Raises ConfigError."""
    file = _opened(path)
    try:
        _share_lock(file)
        yield file
    finally:
        os.close(file)


def is_shared(path: Path) -> bool:
    """Whether anybody holds a share of the lock in `path`. Raises ConfigError."""
    file = _opened(path)
    try:
        return not _try_lock(file)
    finally:
        os.close(file)


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"{path} cannot be opened: {error.strerror}", "Check the data directory.") from None


@contextmanager
def turn(name: str) -> Iterator[None]:
    """One process of this user and machine at a time, whatever its data directory: the others wait here.

    Blocks, so it belongs into a process of its own that somebody ends when it takes too long.
    """
    user = os.getuid() if hasattr(os, "getuid") else "user"
    path = Path(tempfile.gettempdir()) / f"meshnode-{user}-{name}.lock"
    # In a folder that everybody may write to: a link that somebody else laid there is not followed.
    file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        _wait_for_lock(file)
        yield
    finally:
        os.close(file)


if sys.platform == "win32":
    import msvcrt

    def _share_lock(descriptor: int) -> None:
        """There are no stages yet whose locks could be shared (docs/ARCHITECTURE.md, What is Unix only)."""

    def _wait_for_lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _share_lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_SH)

    def _wait_for_lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
