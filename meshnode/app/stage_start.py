"""Start of a stage process: `python -m meshnode.app.stage_start FD [LOCK]` (app/stage_main says what they are).

What a stage imports takes a third of a second of a core, several tokens of whatever streams on the same cores.
"""

from __future__ import annotations

from importlib import import_module

from meshnode.io.stage.yielding import aside

_MODULE = "meshnode.app.stage_main"


def main() -> None:
    """Import aside, then run until the node says shutdown or is gone."""
    aside(lambda: import_module(_MODULE))
    import_module(_MODULE).main()


if __name__ == "__main__":
    main()
