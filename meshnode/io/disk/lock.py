"""One node per data directory: a lock that the system releases when the process ends, however it ends."""

from __future__ import annotations

import os
import sys
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


if sys.platform == "win32":
    import msvcrt

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

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
