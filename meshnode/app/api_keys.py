"""API keys and web origins as a person writes them.

Invariant: no message of this module repeats a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from meshnode.errors import ConfigError

KEYS: Final = 256
"""Every request is compared with all of them: 256 take 0.2 ms."""
KEY_CHARACTERS: Final = 256
"""Of one key; those of providers have up to 164."""
FAR_KEY_CHARACTERS: Final = 16
"""At least, where machines of a network can try keys: 16 letters and digits take longer than anybody has."""
FILE_BYTES: Final = 128 * 1024
"""Of a file with keys: all of them at full length, with comments."""
ORIGINS: Final = 64
"""Web pages that a person names one by one."""

MAKE_ONE: Final = "Make one with `openssl rand -hex 24`."


def parse_keys(value: str | Sequence[object]) -> tuple[str, ...]:
    """Keys of a list, or of a text with commas. ConfigError for what no client could send as a header."""
    parts = value.split(",") if isinstance(value, str) else [str(part) for part in value]
    keys = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if len(keys) > KEYS:
        raise ConfigError(f"{len(keys)} API keys are more than {KEYS}", "Give one key to several programs.")
    for number, key in enumerate(keys, 1):
        if len(key) > KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"API key {number} is not up to {KEY_CHARACTERS} letters, digits and signs", MAKE_ONE)
    return keys


def read_keys(path: Path) -> tuple[str, ...]:
    """Keys of a file, one a line; empty lines and lines that begin with # are none. ConfigError without a key."""
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read the API keys in {path}: {error.strerror}", "Name a file with one a line."
        ) from None
    if len(raw) > FILE_BYTES:
        raise ConfigError(f"{path} has more than {FILE_BYTES} bytes", "It should hold API keys, one a line.")
    lines = raw.decode("utf-8", "replace").splitlines()
    try:
        keys = parse_keys([line for line in lines if not line.lstrip().startswith("#")])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", error.hint) from None
    if not keys:
        raise ConfigError(f"{path} holds no API key", f"Write one a line. {MAKE_ONE}")
    return keys


def parse_origins(value: str | Sequence[object]) -> tuple[str, ...]:
    """Origins of web pages, `scheme://host[:port]` as browsers send them, or `*`. Raises ConfigError."""
    parts = value.split(",") if isinstance(value, str) else [str(part) for part in value]
    origins = tuple(dict.fromkeys(part.strip().rstrip("/").lower() for part in parts if part.strip()))
    if len(origins) > ORIGINS:
        raise ConfigError(f"{len(origins)} origins are more than {ORIGINS}")
    for origin in origins:
        if origin != "*" and not _is_origin(origin):
            raise ConfigError(f"{origin[:80]!r} is no origin", "Write for instance https://chat.example:8080")
    return origins


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
        plain = parts.hostname and parts.port != 0 and not (parts.path or parts.query or parts.fragment or "@" in text)
    except ValueError:
        return False
    return bool(plain) and text.isascii() and parts.scheme.isalpha()
