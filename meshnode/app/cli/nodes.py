"""`serve` and `join`: what a person started the node for, checked before anything runs."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import trio

from meshnode.app.cli.foreground import run_in_foreground
from meshnode.app.config import Settings
from meshnode.app.intent import Intent, Join, Resume, Serve
from meshnode.errors import ConfigError


def serve(model: Path, flags: Mapping[str, object]) -> int:
    """Run a node that serves `model`."""
    path = model.expanduser().absolute()
    if not path.is_file():
        raise ConfigError(f"there is no model file {path}", hint="give the path of a GGUF file; of several, the first")
    return _run(Serve(path), flags)


def join(invite: str | None, flags: Mapping[str, object]) -> int:
    """Run a node that is, or becomes by `invite`, a member. "-" reads the line from stdin, where `ps` cannot see it."""
    if invite == "-":
        # Twice what an invite may be long; more is none.
        invite = sys.stdin.readline(512).strip().removeprefix("meshnode join ")
    if invite is None and sys.stdin.isatty():
        from meshnode.app.cli.comparing import look_around

        look_around(Settings.load(flags, os.environ))
    return _run(Join(invite) if invite is not None else Resume(), flags)


def _run(intent: Intent, flags: Mapping[str, object]) -> int:
    settings = Settings.load(flags, os.environ)
    return run_in_foreground(settings, partial(_node, intent))


async def _node(intent: Intent, settings: Settings, stop: trio.Event) -> None:
    from meshnode.app.node import run_node

    # What is imported by now stays: a collection that walks it takes 20 to 50 ms, in which no token is handed out.
    gc.collect()
    gc.freeze()
    await run_node(settings, intent, stop)
