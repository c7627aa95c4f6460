"""`meshnode root export`: the key that the whole mesh rests on, into a file that only a passphrase opens.

Invariant: the key on this machine is removed only after the exported one was read back and is the same.
"""

from __future__ import annotations

import os
import sys
from getpass import getpass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from meshnode.app.config import Settings
from meshnode.errors import ConfigError
from meshnode.identity.keys import private_key_of, spki_of
from meshnode.io.disk.atomic import PRIVATE, write_atomic

ROOT_KEY = "root.key"
SHORTEST = 12
"""Characters of a passphrase: PKCS 8 stretches it by little, so its length has to."""


def export(target: Path, remove: bool, data: Path | None) -> int:
    """Write the root key, encrypted, to `target`; with `remove`, this machine keeps none."""
    folder = Settings.load({"data": data}, os.environ).data
    key = _root_key(folder / ROOT_KEY)
    if target.exists():
        raise ConfigError(f"{target} exists already", "Name a file that does not: an older export may be the only one.")
    passphrase = _passphrase()
    write_atomic(target, encrypted(key, passphrase), PRIVATE)
    if spki_of(decrypted(target.read_bytes(), passphrase).public_key()) != spki_of(key.public_key()):
        raise ConfigError(f"{target} does not hold what was written to it", "Nothing was removed. Try another disk.")
    sys.stdout.write(f"the root key of this mesh is in {target}\n")
    if remove:
        (folder / ROOT_KEY).unlink()
        sys.stdout.write(
            "and no longer on this machine, which goes on inviting for a year. To put it back:\n"
            f"  (umask 077; openssl pkey -in {target} -out {folder / ROOT_KEY})\n"
        )
    return 0


def encrypted(key: Ed25519PrivateKey, passphrase: bytes) -> bytes:
    """PKCS 8 in PEM, as OpenSSL reads it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase))


def decrypted(pem: bytes, passphrase: bytes) -> Ed25519PrivateKey:
    """Read back what `encrypted` wrote. ConfigError for anything else, and for another passphrase."""
    try:
        key = load_pem_private_key(pem, passphrase)
    except (ValueError, TypeError):
        raise ConfigError("that is no exported root key, or another passphrase") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError("that is no exported root key")
    return key


def _root_key(path: Path) -> Ed25519PrivateKey:
    try:
        return private_key_of(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"this machine holds no root key ({path})",
            "It is on the machine that made the mesh, unless it was exported and removed there.",
        ) from None
    except ValueError:
        raise ConfigError(f"{path} is damaged or encrypted") from None


def _passphrase() -> bytes:
    """Asked twice in a terminal; elsewhere two lines of stdin."""
    first, again = _ask("Passphrase: "), _ask("The same again: ")
    if first != again:
        raise ConfigError("the two passphrases differ", "Nothing was written. Try again.")
    if len(first) < SHORTEST:
        raise ConfigError(f"a passphrase needs at least {SHORTEST} characters", "Four words are easy to keep.")
    return first.encode()


def _ask(prompt: str) -> str:
    return getpass(prompt) if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
