"""How a function becomes a command, and the options that every part of the command line shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, NoReturn

import typer

from meshnode.app.cli.failure import guarded

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for programs.")]


def command(group: typer.Typer, name: str | None = None) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a function as a command whose result is the exit code and whose errors are told, not traced."""

    def register(run: Callable[..., int]) -> Callable[..., int]:
        @wraps(run)
        def guarded_run(*arguments: Any, **options: Any) -> NoReturn:
            raise typer.Exit(guarded(lambda: run(*arguments, **options)))

        group.command(name)(guarded_run)
        return run

    return register
