"""Small files by name: read within a bound, replaced whole, damage told.

Invariant: whatever is wrong with a file ends in `ConfigError` that names it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from meshnode.errors import ConfigError, PeerError
from meshnode.io.disk.atomic import PUBLIC, write_atomic

SMALL_FILE = 64 * 1024
"""Keys, certificates, counters are below 4 KiB: something longer is not ours."""

_T = TypeVar("_T")


class Folder:
    """One folder of small files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str, limit: int = SMALL_FILE) -> bytes | None:
        """The content, or None when there is no such file; `ConfigError` beyond `limit` bytes."""
        path = self.path / name
        try:
            with path.open("rb") as file:
                data = file.read(limit + 1)
        except FileNotFoundError:
            return None
        except OSError as problem:
            raise unusable(path, problem) from None
        if len(data) > limit:
            raise self.damaged(name)
        return data

    def parsed(self, name: str, parse: Callable[[bytes], _T], limit: int = SMALL_FILE) -> _T | None:
        """`parse` of the content, or None when there is no such file; what `parse` refuses is damage."""
        data = self.read(name, limit)
        if data is None:
            return None
        try:
            return parse(data)
        except (ValueError, PeerError):
            raise self.damaged(name) from None

    def write(self, name: str, data: bytes, mode: int = PUBLIC) -> None:
        """Replace the file; durable when this returns."""
        try:
            write_atomic(self.path / name, data, mode)
        except OSError as problem:
            raise unusable(self.path / name, problem) from None

    def damaged(self, name: str) -> ConfigError:
        """The error that says so."""
        hint = "Restore it from a backup, or start with an empty directory: --data PATH."
        return ConfigError(f"{self.path / name} is damaged", hint)


def unusable(path: Path, problem: OSError) -> ConfigError:
    """What the system refused, as the user's error."""
    return ConfigError(f"{path}: {problem.strerror or problem}", "Choose another directory with --data PATH.")
