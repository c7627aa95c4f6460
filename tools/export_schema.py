"""Write the wire contract of this checkout into proto/: schema of every message, and vectors for those without.

    python -m tools.export_schema          write what has grown
    python -m tools.export_schema --check  only say whether something would be written (exit code 1)

A schema is not overwritten when the change is more than growth, until proto/CHANGES.md gives the reason. Vectors are
only ever added.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from meshnode.wire.preface import PROTOCOL
from tools.contract.growth import allowed, breaks
from tools.contract.jsonform import text_of
from tools.contract.protocols import Protocol, protocols
from tools.contract.schema import schema
from tools.contract.vectors import missing

PROTO = Path(__file__).parent.parent / "proto"


def recorded(folder: str, protocol: Protocol) -> Any:
    """What proto/ says of a protocol, None when it is new."""
    path = PROTO / folder / f"{protocol.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def exported(protocol: Protocol) -> Any:
    """The schema of a protocol as its file would hold it."""
    return json.loads(json.dumps(schema(protocol)))


def refused(protocol: Protocol) -> list[str]:
    """What keeps the schema of a protocol from being written."""
    old = recorded("schema", protocol)
    if old is None:
        return []
    reasons = allowed((PROTO / "CHANGES.md").read_text(encoding="utf-8"), PROTOCOL)
    return [f"{path}: {what}" for path, what in breaks(old, exported(protocol)) if path not in reasons]


def files(protocol: Protocol) -> dict[Path, str]:
    """Both files of a protocol as they should be."""
    known = recorded("vectors", protocol) or []
    return {
        PROTO / "schema" / f"{protocol.name}.json": text_of(exported(protocol)),
        PROTO / "vectors" / f"{protocol.name}.json": text_of([*known, *missing(protocol, known)]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    broken = [line for protocol in protocols() for line in refused(protocol)]
    if broken:
        print("an older node could not overlook this; proto/CHANGES.md must say why:", *broken, sep="\n  ")
        return 1
    stale = 0
    for protocol in protocols():
        for path, text in files(protocol).items():
            if path.exists() and path.read_text(encoding="utf-8") == text:
                continue
            stale += 1
            print("differs:" if check else "written:", path.relative_to(PROTO.parent))
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
