"""Whose prompt is whose: what one API key's requests leave in a cache is never used for another's.

How long a first token takes, and the count of cached tokens, would tell a client which prompts others sent. An owner is
a name that a node makes for a key, without meaning elsewhere; where no keys are set, all clients are one owner.

Invariant: a client cannot choose its owner: it comes from the key that was checked, or from the node that checked it.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from starlette.types import Scope

OWNER_HEADER: Final = "x-meshnode-owner"
"""Of a request that is passed on to another node; what a client sends under this name is not passed on."""

_EXTENSION: Final = "meshnode.owner"


def owner_name(secret: bytes, key: bytes) -> str:
    """The owner of a key's requests. `secret` is this process' own, so that the name says nothing about the key."""
    return hmac.new(secret, key, hashlib.sha256).hexdigest()[:32]


def owned(scope: Scope, owner: str) -> Scope:
    """`scope` of a request of `owner`."""
    return {**scope, "extensions": {**scope.get("extensions", {}), _EXTENSION: owner}}


def owner_of(scope: Scope) -> str:
    """Empty where no keys are set."""
    owner: str = scope.get("extensions", {}).get(_EXTENSION, "")
    return owner
