"""Writing a file so that a crash leaves the old one or the new one, whole.

Invariant: when `write_atomic` has returned, the new content survives a power cut.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

PRIVATE = 0o600
PUBLIC = 0o644


def write_atomic(path: Path, data: bytes, mode: int = PUBLIC) -> None:
    """Replace `path` with `data`: temporary file, fsync, rename, fsync of the directory. `OSError` as it comes."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        # Created with its mode: a key is at no moment readable by others.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames in `path` durable. Windows cannot open a directory and needs no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
