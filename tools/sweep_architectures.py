"""Verify every model of a folder in two slices and print a table with totals.

    python tools/sweep_architectures.py FOLDER [--stages N]

FOLDER comes from llama.cpp's own `test-llama-archs -o FOLDER` (build its target `test-llama-archs` in the sources
inside the sdist of llama-cpp-python). Takes about a second a model. Exit code 1 for any difference or crash.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from meshnode.app.verify import verify_model
from meshnode.errors import ConfigError, MeshError, ModelError


def verified(path, stages):
    """The report of the most stages, up to `stages`, that the model allows."""
    try:
        return verify_model(path, stages)
    except ModelError:
        raise
    except ConfigError:
        if stages == 2:
            raise
        return verified(path, stages - 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", type=int, default=2)
    arguments = parser.parse_args()
    totals = Counter()
    for path in sorted(arguments.folder.glob("*.gguf")):
        try:
            report = verified(path, arguments.stages)
            verdict, note = report.verdict, report.reason or f"{report.max_abs_diff:g}"
        except MeshError as error:
            verdict, note = "failed", str(error)
        totals[verdict] += 1
        print(f"{path.stem:28} {verdict:15} {note if verdict != 'exact' else ''}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in totals.most_common()))
    return int(any(totals[verdict] for verdict in ("different", "failed")))


if __name__ == "__main__":
    sys.exit(main())
