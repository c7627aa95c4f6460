"""An environment for each client, because clients ask for versions that exclude each other.

Made once per content of its requirement file, below `.clients/` of the checkout, from exact versions. Where the
registry cannot be reached, the test fails and says so: a client that was not tried is not a client that works.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent.parent / ".clients"
INSTALL_S = 900
"""The largest (lm-eval) takes a minute here; a slow line takes longer, a hang still ends."""
COMPLETE = "complete"
"""Written last: an installation that was cut off is made anew."""


def python_environment(name: str) -> Path:
    """The interpreter of a virtual environment with `requirements/<name>.txt`."""
    wanted = HERE / "requirements" / f"{name}.txt"
    place = _place(name, wanted.read_bytes() + platform.python_version().encode())
    interpreter = place / "bin" / "python"
    if not (place / COMPLETE).exists():
        _empty(place)
        _run([sys.executable, "-m", "venv", str(place)])
        _run([str(interpreter), "-m", "pip", "install", "--quiet", "--no-input", "-r", str(wanted)])
        (place / COMPLETE).touch()
    return interpreter


def node_environment() -> Path:
    """The folder with `node_modules` for `npm/package-lock.json`; scripts have to lie in it to find them."""
    lock = HERE / "npm" / "package-lock.json"
    place = _place("npm", lock.read_bytes())
    if not (place / COMPLETE).exists():
        _empty(place)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / "npm" / name, place / name)
        _run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], place)
        (place / COMPLETE).touch()
    return place


def _place(name: str, content: bytes) -> Path:
    return ENVIRONMENTS / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"


def _empty(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)


def _run(command: list[str], folder: Path | None = None) -> None:
    kept = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
